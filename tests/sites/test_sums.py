"""The head from sums against scikit-learn's ridge on all features in one place."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from fedssl.sites.sums import (
    DECAYS,
    TEMPERATURES,
    Judgement,
    Standardized,
    Sums,
    add_up,
    choose_decay_alone,
    leave_out_rare,
    unpack_sums,
)

CLASSES, SIZE = 4, 12


def make_features(rng, count, size=SIZE, classes=CLASSES):
    """Features as behind a ReLU: not centred, of different scales, one that never varies."""
    labels = rng.integers(0, classes, count)
    centres = np.random.default_rng(0).normal(size=(classes, size))
    features = np.maximum(0, centres[labels] + rng.normal(size=(count, size)) + 1)
    features = features * np.logspace(-2, 1, size)
    features[:, 3] = 0.0
    return features.astype(np.float32), labels


def ridge_in_one_place(features, labels, decay, classes=CLASSES):
    scaler = StandardScaler().fit(features.astype(np.float64))
    inputs = scaler.transform(features.astype(np.float64))
    model = Ridge(alpha=decay * len(labels)).fit(inputs, np.eye(classes)[labels])
    return lambda queries: model.predict(scaler.transform(queries.astype(np.float64)))


@pytest.fixture
def data(rng):
    return make_features(rng, 300)


def split(labels, parts, rng):
    """Deal rows out unevenly: the first part holds one class alone, the last nothing."""
    first = np.flatnonzero(labels == 0)
    rest = rng.permutation(np.flatnonzero(labels != 0))
    cuts = np.sort(rng.integers(0, len(rest), parts - 3))
    return [first, *np.split(rest, cuts), np.array([], dtype=int)]


@pytest.mark.parametrize("parts", [3, 5, 100])
@pytest.mark.parametrize("decay", [1.0, 1e-2, 1e-4])
def test_the_head_from_sums_is_that_of_all_features_in_one_place(data, rng, parts, decay):
    features, labels = data
    pieces = split(labels, parts, rng)
    assert len(pieces) == parts
    sums = [add_up(features[rows], labels[rows], CLASSES) for rows in pieces]
    head = Standardized.of(sum(sums[1:], sums[0])).solve(decay)
    queries, _ = make_features(rng, 200)
    expected = ridge_in_one_place(features, labels, decay)(queries)
    np.testing.assert_allclose(queries @ head.weight + head.bias, expected, atol=2e-5)
    assert np.array_equal(head.predict(queries), expected.argmax(axis=1))


def test_sums_come_through_their_packing(data):
    features, labels = data
    sums = add_up(features, labels, CLASSES)
    packed = sums.pack()
    floats = SIZE * (SIZE + 1) // 2 + SIZE * CLASSES
    assert sum(value.nbytes for value in packed.values()) == 8 * (floats + CLASSES)
    again = unpack_sums(packed, SIZE, CLASSES)
    for name in ("counts", "totals", "gram"):
        np.testing.assert_array_equal(getattr(again, name), getattr(sums, name))
    assert sums.images == 300
    part = add_up(features[:100], labels[:100], CLASSES)
    np.testing.assert_allclose(
        sums.without(part).gram, add_up(features[100:], labels[100:], CLASSES).gram
    )


def test_nothing_to_add_is_sums_of_nothing():
    nothing = add_up(np.zeros((0, SIZE), np.float32), np.array([], dtype=int), CLASSES)
    assert nothing.images == 0
    assert unpack_sums(nothing.pack(), SIZE, CLASSES).images == 0
    with pytest.raises(ValueError, match="no labelled images"):
        Standardized.of(nothing)


def break_sums(sums, how):
    packed = {name: value.copy() for name, value in sums.pack().items()}
    how(packed)
    return packed


def make_indefinite(packed):
    packed["gram"][0] -= 1e4


def hide_a_square(packed):
    packed["totals"] *= 3  # more than the squares allow


BROKEN = {
    "gram is missing": lambda packed: packed.pop("gram"),
    "gram has shape": lambda packed: packed.update(gram=packed["gram"][:-1]),
    "totals has shape": lambda packed: packed.update(totals=packed["totals"][:, :-1]),
    "totals holds numbers that are not finite": lambda packed: packed["totals"].fill(np.nan),
    "counts are no numbers of images": lambda packed: packed.update(counts=-packed["counts"]),
    "features of classes without images": lambda packed: packed["counts"].fill(0),
    "negative eigenvalue": make_indefinite,
    r"no sum of squares": hide_a_square,
}


@pytest.mark.parametrize("message", BROKEN)
def test_what_cannot_be_sums_is_refused(data, message):
    packed = break_sums(add_up(*data, CLASSES), BROKEN[message])
    with pytest.raises(ValueError, match=message) as error:
        unpack_sums(packed, SIZE, CLASSES)
    assert "\n" not in str(error.value)


def test_cross_validation_from_sums_equals_the_formula_with_all_features(data):
    features, labels = data
    standardized = Standardized.of(add_up(features, labels, CLASSES))
    inputs = StandardScaler().fit_transform(features.astype(np.float64))
    inputs = np.column_stack([inputs, np.ones(len(labels))])
    targets = np.eye(CLASSES)[labels]
    for decay in (1.0, 1e-3):
        penalty = np.diag([decay * len(labels)] * SIZE + [0.0])
        hat = inputs @ np.linalg.solve(inputs.T @ inputs + penalty, inputs.T)
        residual = targets - hat @ targets
        free = len(labels) - np.trace(hat)
        expected = len(labels) * (residual**2).sum() / free**2
        assert standardized.generalized_cross_validation(decay) == pytest.approx(expected)


def test_the_decay_is_the_best_of_the_folds_and_the_largest_of_equals():
    flat = np.zeros((len(DECAYS), len(TEMPERATURES)))
    correct = np.zeros(len(DECAYS), dtype=int)
    assert DECAYS[Judgement(correct, flat).best()] == max(DECAYS)
    correct[3] = correct[7] = 5
    judgement = Judgement(correct, flat)
    assert judgement.best() == 3
    assert (judgement + judgement).correct[7] == 10


def test_the_temperature_makes_the_images_least_surprising(data):
    features, labels = data
    head = Standardized.of(add_up(features, labels, CLASSES)).solve(1e-2)
    judgement = Judgement.of([head], features, labels)
    assert judgement.correct[0] == (head.predict(features) == labels).sum()
    surprises = []
    for temperature, told in zip(TEMPERATURES, judgement.surprise[0], strict=True):
        chances = head.sharpened(temperature).probabilities(features)
        np.testing.assert_allclose(chances.sum(axis=1), 1)
        surprises.append(-np.log(chances[np.arange(len(labels)), labels]).sum())
        assert told == pytest.approx(surprises[-1], rel=1e-4)
    assert judgement.temperature(0) == TEMPERATURES[int(np.argmin(surprises))]
    sharp = head.sharpened(judgement.temperature(0))
    assert np.array_equal(sharp.predict(features), head.predict(features))


def test_few_images_with_much_noise_want_a_larger_decay(rng):
    few, many = (
        choose_decay_alone(Standardized.of(add_up(*make_features(rng, count, 40), CLASSES)))
        for count in (45, 4000)
    )
    assert few > many


def test_classes_with_too_few_images_are_left_out():
    labels = np.array([0, 0, 0, 1, 2, 2])
    rows, rare = leave_out_rare(labels, 4, 2)
    assert rows.tolist() == [0, 1, 2, 4, 5]
    assert rare.tolist() == [1]
    rows, rare = leave_out_rare(labels, 4, 1)
    assert (len(rows), len(rare)) == (6, 0)


def test_sums_are_exact_for_integers():
    features = np.array([[1, 2], [3, 4]], dtype=np.float32)
    sums = add_up(features, np.array([1, 1]), 2)
    assert isinstance(sums, Sums)
    assert sums.gram.tolist() == [[10, 14], [14, 20]]
    assert sums.totals.tolist() == [[0, 4], [0, 6]]
