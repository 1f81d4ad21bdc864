"""Labels that stay at the sites: the same head, and the same score, as with all in one place."""

from dataclasses import replace

import numpy as np
import pytest
from evaluation.small import COMMON, HEAD, make_data, make_encoder
from sites.test_sums import make_features, ridge_in_one_place

from fedssl.data.sources.base import NO_LABEL
from fedssl.errors import UserError
from fedssl.networks.state import state_digest
from fedssl.sites.evaluation import FederatedEvaluation
from fedssl.sites.heads import SiteScores, can_stand_in, fit_from_sums, score, train_by_rounds
from fedssl.sites.site import (
    Counts,
    HeadSettings,
    LocalSites,
    Site,
    deal_like,
    draw_share,
    group_sites,
)
from fedssl.sites.sums import DECAYS, TEMPERATURES, add_up

CLASSES, SIZE = 4, 12
EVALUATION = FederatedEvaluation(**COMMON, **HEAD, min_images=2, folds=10)


def make_site(features, labels, test=None):
    test = test or (np.zeros((0, SIZE), np.float32), np.array([], dtype=int))
    return Site(features, labels, *test, CLASSES)


@pytest.fixture
def sites(rng):
    """Five sites with all classes, one without any image."""
    features, labels = make_features(rng, 400)
    test = make_features(rng, 300)
    cuts, test_cuts = [[10, 60, 200, 320, 400], [5, 100, 200, 290, 300]]
    parts = zip(
        *(np.split(each, cuts) for each in (features, labels)),
        *(np.split(each, test_cuts) for each in test),
        strict=True,
    )
    made = {number: make_site(f, y, (t, u)) for number, (f, y, t, u) in enumerate(parts)}
    return LocalSites(made, seed=0), features, labels, test


def test_the_head_and_its_score_are_those_of_one_place(sites):
    made, features, labels, (queries, truth) = sites
    _, head = fit_from_sums(made, folds=10)
    candidates = [ridge_in_one_place(features, labels, decay)(queries) for decay in DECAYS]
    found = queries @ head.weight + head.bias  # divided by one of the temperatures
    apart = [
        np.abs(found * temperature - each).max()
        for each in candidates
        for temperature in TEMPERATURES
    ]
    assert min(apart) < 2e-5
    expected = candidates[int(np.argmin(apart)) // len(TEMPERATURES)].argmax(axis=1)
    (scores,) = score(made, [head])
    assert scores.top1 == (expected == truth).mean()
    by_hand = np.zeros((CLASSES, CLASSES), dtype=int)
    for true, predicted in zip(truth, expected, strict=True):
        by_hand[true, predicted] += 1
    assert np.array_equal(scores.total.confusion, by_hand)
    told = scores.to_json()
    recalls = [by_hand[c, c] / by_hand[c].sum() for c in range(CLASSES)]
    assert told["balanced"] == pytest.approx(np.mean(recalls))
    assert set(told["by_site"]) == {0, 1, 2, 3, 4}  # the last has no test images
    assert told["spread_over_sites"] > 0
    chances = head.probabilities(queries)
    confidence, right = chances.max(axis=1), chances.argmax(axis=1) == truth
    bins = np.minimum((10 * confidence).astype(int), 9)
    gaps = [abs((confidence - right)[bins == each].sum()) for each in range(10)]
    assert told["calibration_error"] == pytest.approx(sum(gaps) / len(truth))
    assert told["calibration_error"] < 0.15


def test_folds_of_sites_choose_what_leaves_each_site_out(sites):
    made, features, labels, _ = sites
    rows = np.split(np.arange(400), [10, 60, 200, 320])
    correct = np.zeros(len(DECAYS), dtype=int)
    for held in rows:
        rest = np.setdiff1d(np.arange(400), held)
        for place, decay in enumerate(DECAYS):
            predict = ridge_in_one_place(features[rest], labels[rest], decay)
            correct[place] += (predict(features[held]).argmax(axis=1) == labels[held]).sum()
    best = max(np.asarray(DECAYS)[correct == correct.max()])
    _, head = fit_from_sums(made, folds=10)
    queries, _ = make_features(np.random.default_rng(5), 50)
    expected = ridge_in_one_place(features, labels, best)(queries)
    found = queries @ head.weight + head.bias
    apart = [np.abs(found * temperature - expected).max() for temperature in TEMPERATURES]
    assert min(apart) < 2e-5


def test_sites_whose_classes_are_their_own_cannot_stand_in_for_each_other(rng):
    features, labels = make_features(rng, 200)
    parts = [np.flatnonzero(np.isin(labels, pair)) for pair in ((0, 1), (2, 3))]
    assert not can_stand_in([add_up(features[p], labels[p], CLASSES) for p in parts])
    assert not can_stand_in([add_up(features, labels, CLASSES)])
    halves = np.array_split(np.arange(200), 2)
    assert can_stand_in([add_up(features[h], labels[h], CLASSES) for h in halves])
    made = {n: make_site(features[p], labels[p]) for n, p in enumerate(parts)}
    _, head = fit_from_sums(LocalSites(made, seed=0), folds=10)  # by cross-validation from the sums
    assert (head.predict(features) == labels).mean() > 0.5


def test_one_site_trained_by_rounds_learns_and_others_join(sites):
    made, features, labels, (queries, truth) = sites
    standardized, _ = fit_from_sums(made, folds=10)
    settings = HeadSettings(epochs=20, batch_size=16, learning_rate=0.03, weight_decay=0.01)
    other_order = LocalSites(made.sites, seed=1)
    head, again, other = (
        train_by_rounds(each, standardized, settings) for each in (made, made, other_order)
    )
    assert np.array_equal(head.weight, again.weight)
    assert not np.array_equal(head.weight, other.weight)
    best = (ridge_in_one_place(features, labels, 1e-2)(queries).argmax(axis=1) == truth).mean()
    assert (head.predict(queries) == truth).mean() > best - 0.1


def test_nobody_with_labels_is_an_error():
    empty = make_site(np.zeros((0, SIZE), np.float32), np.array([], dtype=int))
    with pytest.raises(ValueError, match="no labelled images"):
        fit_from_sums(LocalSites({0: empty, 1: empty}, seed=0), folds=10)
    with pytest.raises(ValueError, match="no labelled images"):
        fit_from_sums(LocalSites({}, seed=0), folds=10)


def test_a_share_of_the_labels_is_stratified_seeded_and_never_fails(rng):
    labels = rng.permutation(np.repeat([0, 1, 2, NO_LABEL], [60, 30, 10, 20]))
    rows = draw_share(labels, 0.1, seed=0)
    counts = np.bincount(labels[rows], minlength=3)
    assert len(rows) == 10
    assert np.abs(counts - [6, 3, 1]).max() <= 1
    assert (np.diff(rows) > 0).all()
    assert np.array_equal(rows, draw_share(labels, 0.1, seed=0))
    assert not np.array_equal(rows, draw_share(labels, 0.1, seed=1))
    assert len(draw_share(labels, 1.0, seed=0)) == 100
    assert len(draw_share(labels[:0], 0.1, seed=0)) == 0


def test_test_images_go_where_their_classes_are(rng):
    labels, test_labels = rng.integers(0, 3, 300), rng.integers(0, 4, 90)
    test_labels[0] = NO_LABEL
    parts = [np.flatnonzero(labels == 0), np.flatnonzero(labels != 0)[:50]]
    parts.append(np.setdiff1d(np.arange(300), np.concatenate(parts)))
    dealt = deal_like(parts, labels, test_labels, seed=0)
    assert np.array_equal(np.sort(np.concatenate(dealt)), np.arange(1, 90))
    assert set(test_labels[dealt[0]].tolist()) <= {0, 3}  # of class 3 nobody has images
    share = (labels[parts[1]] == 1).sum() / (labels == 1).sum()
    held = (test_labels[dealt[1]] == 1).sum() / (test_labels == 1).sum()
    assert held == pytest.approx(share, abs=0.05)


def test_sites_are_grouped_by_their_images():
    groups = group_sites({0: 10, 1: 0, 2: 5, 3: 5, 4: 1}, folds=2)
    assert groups == [[0, 4], [2, 3]]
    assert group_sites({0: 1, 1: 1}, folds=10) == [[0], [1]]


def test_rare_classes_and_images_without_a_label_stay_out(rng):
    features = rng.normal(size=(6, SIZE)).astype(np.float32)
    labels = np.array([0, 0, 1, 2, 2, NO_LABEL])
    site = Site.of(features, labels, features, labels, CLASSES, min_images=2)
    assert site.labels.tolist() == [0, 0, 2, 2]
    assert site.left_out == (1,)
    assert site.test_labels.tolist() == [0, 0, 1, 2, 2]
    assert site.sums().counts.tolist() == [2, 0, 2, 0]


@pytest.mark.parametrize("dealt", ["even", "two classes"])
def test_a_run_is_evaluated_at_its_sites(digits, dealt):
    data = make_data(digits)
    rows = np.arange(len(digits.train.labels))
    labels = digits.train.labels
    parts = (
        np.array_split(rows, 5)
        if dealt == "even"
        else [rows[labels // 2 == pair] for pair in range(5)]
    )
    data = replace(data, partitions=parts)
    encoder = make_encoder()
    digest = state_digest(encoder)
    scores = EVALUATION.run("it", encoder, data)
    assert state_digest(encoder) == digest
    assert [score.method for score in scores] == [
        "head from sums",
        "head by rounds",
        "own head at each site",
        "linear head, labels in one place",
        "converged head, labels in one place",
    ]
    from_sums, _, own, linear, converged = (score.mean for score in scores)
    assert from_sums > max(linear, converged) - 0.05
    assert (own > from_sums) == (dealt == "two classes")  # two classes are easier than ten
    assert scores[2].head is None
    assert EVALUATION.count_labelled(data) == pytest.approx(143, abs=3)
    assert len(scores[0].sites) == 2
    assert np.sum(scores[0].sites[0]["confusion"]) == len(digits.test.labels)
    assert scores[0].to_json()["sites"] == scores[0].sites


def test_scores_of_no_images_are_zero():
    tested = Counts(np.zeros((2, 2), dtype=int), np.zeros((10, 3)))
    assert SiteScores(None, {0: tested}).top1 == 0


def test_the_own_head_of_a_single_site_is_the_one_from_sums(rng):
    site = make_site(*make_features(rng, 100), make_features(rng, 50))
    alone = LocalSites({0: site}, seed=0)
    _, head = fit_from_sums(alone, folds=10)
    assert np.array_equal(site.own_head().weight, head.weight)
    assert np.array_equal(alone.test_own(head)[0].confusion, site.test([head])[0].confusion)


def test_a_site_without_labels_is_scored_by_the_shared_head(rng):
    features, labels = make_features(rng, 100)
    test = make_features(rng, 50)
    bare = make_site(features[:0], labels[:0], test)
    sites = LocalSites({0: make_site(features, labels, test), 1: bare}, seed=0)
    _, head = fit_from_sums(sites, folds=10)
    assert bare.own_head() is None
    assert np.array_equal(sites.test_own(head)[1].confusion, bare.test([head])[0].confusion)
    one_class = make_site(features[labels == 1], labels[labels == 1], test)
    assert (one_class.own_head().predict(features) == 1).all()


def test_what_is_left_out_is_counted_by_site(rng):
    features, labels = make_features(rng, 6)
    labels[:] = [0, 0, 1, 2, 2, 2]
    given = features, labels, features, labels, CLASSES
    sites = {number: Site.of(*given, min_images=least) for number, least in enumerate((1, 2, 3))}
    asked = LocalSites(sites, seed=0)
    assert asked.left_out() == {0: 0, 1: 1, 2: 2}
    (scores,) = score(asked, [fit_from_sums(asked, folds=10)[1]])
    assert scores.to_json()["left_out"] == {1: 1, 2: 2}


def test_a_single_class_at_all_sites_gets_a_line(digits):
    labels = digits.train.labels
    first = np.flatnonzero(labels == 0)
    rare = np.flatnonzero(labels == 1)[:5]
    parts = [np.append(part, one) for part, one in zip(np.array_split(first, 5), rare, strict=True)]
    data = replace(make_data(digits), partitions=parts)
    evaluation = replace(EVALUATION, label_fraction=1, min_images=2)
    with pytest.raises(UserError, match=r"so many labels of a second class; lower it"):
        evaluation.run("it", make_encoder(), data)


def test_too_few_labels_at_every_site_get_a_line(digits):
    rows = np.arange(len(digits.train.labels))
    data = replace(make_data(digits), partitions=np.array_split(rows, 100))
    with pytest.raises(UserError, match=r"^min_images=9: no site draws so many") as error:
        replace(EVALUATION, min_images=9).run("it", make_encoder(), data)
    assert "\n" not in str(error.value)
