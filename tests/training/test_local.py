"""Local training and the held-out loss, on digits."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from samples import (
    BACKEND,
    CPU,
    OPTIMIZER,
    SETTINGS,
    VIEWS,
    WHOLE_RUN,
    make_simclr,
    state_bytes,
)

from fedssl.compute import Backend, choose_dtype
from fedssl.seeding import generator_for
from fedssl.training.local import (
    add_proximal_gradient,
    cache_on_device,
    get_batch,
    local_loss,
    local_train,
)
from fedssl.training.optimizers import zero_momentum
from fedssl.training.schedule import RoundPlan

pytestmark = pytest.mark.usefixtures("narrow")


@pytest.fixture
def train(digits):
    """Train a fresh method on the first images; return it with the result."""

    def run(
        count=64,
        seed=0,
        proximal_mu=0.0,
        dtype=torch.float32,
        plan=WHOLE_RUN,
        pixels=None,
        method=None,
        optimizer=OPTIMIZER,
        momentum=None,
        **changes,
    ):
        method = method or make_simclr()
        result = local_train(
            method,
            digits.train.pixels if pixels is None else pixels,
            np.arange(count),
            VIEWS,
            replace(SETTINGS, optimizer=optimizer, **changes),
            plan=plan,
            proximal_mu=proximal_mu,
            generator=generator_for(seed, "test"),
            backend=Backend(CPU, dtype),
            momentum=momentum,
        )
        return method, result

    return run


@pytest.fixture
def held_out(digits):
    """Compute loss and measures of images that nothing was trained on."""

    def measure(method, seed=0, rows=None, batch_size=32):
        return local_loss(
            method,
            digits.train.pixels,
            np.arange(200, 280) if rows is None else rows,
            VIEWS,
            batch_size=batch_size,
            generator=generator_for(seed, "evaluate"),
            backend=BACKEND,
        )

    return measure


def distance(method, other):
    pairs = zip(method.parameters(), other.parameters(), strict=True)
    return sum(float((a - b).detach().square().sum()) for a, b in pairs) ** 0.5


def rates(rate, name="sgd"):
    return replace(OPTIMIZER, name=name, learning_rate=rate, muon_learning_rate=rate)


def test_training_lowers_the_loss_of_unseen_images(held_out, train):
    trained, result = train(count=192, local_epochs=4)
    assert result.images == 4 * 192
    assert result.images_per_second > 0
    (before, _), (after, _) = (held_out(method) for method in (make_simclr(), trained))
    assert after < before - 0.1


def test_the_seed_decides_the_bytes(train):
    first, again, other = train(seed=1)[0], train(seed=1)[0], train(seed=2)[0]
    assert state_bytes(first) == state_bytes(again)
    assert state_bytes(first) != state_bytes(other)


def test_images_held_as_a_tensor_give_the_same_bytes(train, digits):
    """As a GPU holds them."""
    held = train(pixels=torch.from_numpy(np.array(digits.train.pixels)))[0]
    assert state_bytes(held) == state_bytes(train()[0])
    assert cache_on_device(digits.train.pixels, CPU) is digits.train.pixels


def test_a_batch_comes_in_ascending_order_from_an_array_and_a_tensor(digits):
    rows = np.array([7, 2, 5])
    pixels = np.array(digits.train.pixels)
    expected = torch.from_numpy(pixels[[2, 5, 7]])
    assert torch.equal(get_batch(digits.train.pixels, rows, CPU), expected)
    assert torch.equal(get_batch(torch.from_numpy(pixels), rows, CPU), expected)


@pytest.mark.parametrize(("count", "images"), [(2, 2), (31, 31), (33, 32), (70, 64)])
def test_a_client_uses_the_batches_it_can_fill(train, count, images):
    assert train(count=count)[1].images == images


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_images_are_refused(train, held_out, count):
    with pytest.raises(ValueError, match=f"has {count}"):
        train(count=count)
    with pytest.raises(ValueError, match=f"got {count}"):
        held_out(make_simclr(), rows=np.arange(count))


@pytest.mark.parametrize(
    ("changes", "fraction", "steps"),
    [
        ({}, 1.0, 3),
        ({"local_epochs": 4}, 1.0, 12),
        ({"local_epochs": 4, "max_steps": 5}, 1.0, 5),
        ({"local_epochs": 4}, 0.25, 3),
        ({"local_epochs": 4, "max_steps": 5}, 0.2, 1),
        ({}, 0.01, 1),  # one at least
    ],
)
def test_a_round_has_so_many_steps(changes, fraction, steps):
    assert replace(SETTINGS, **changes).steps(100, fraction) == steps


def test_a_part_of_a_round_takes_a_part_of_the_steps(train):
    plan = RoundPlan(0.25, 0.0, 0.25)
    assert train(count=128, local_epochs=2, plan=plan)[1].images == 2 * 32


def test_the_learning_rate_falls_over_the_whole_run(train):
    start = make_simclr()
    early, _ = train(max_steps=1, plan=RoundPlan(1.0, 0.0, 0.1))
    late, _ = train(max_steps=1, plan=RoundPlan(1.0, 0.9, 1.0))
    assert 0 < distance(late, start) < 0.1 * distance(early, start)


def test_a_smaller_batch_takes_proportionally_smaller_steps(train):
    plain = rates(0.02)
    whole, _ = train(count=16, batch_size=16, max_steps=1, optimizer=plain)
    half, _ = train(count=16, batch_size=32, max_steps=1, optimizer=plain)
    start = make_simclr()
    assert distance(half, start) == pytest.approx(distance(whole, start) / 2, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("sgd", "optimizer.learning_rate"),
        ("muon", "optimizer.learning_rate or optimizer.muon_learning_rate"),
    ],
)
def test_a_diverged_loss_is_an_error_that_names_the_remedy(train, name, remedy):
    with pytest.raises(FloatingPointError, match=f"lower {remedy}$"):
        train(optimizer=rates(1e30, name), local_epochs=3)


def test_fedprox_keeps_the_weights_near_the_global_ones(train):
    start = make_simclr()
    free, _ = train(local_epochs=8, optimizer=rates(0.02))
    tied, _ = train(local_epochs=8, optimizer=rates(0.02), proximal_mu=5.0)
    assert distance(tied, start) < 0.6 * distance(free, start)


def test_fedprox_adds_the_gradient_of_its_term():
    method = make_simclr()
    global_params = [p.detach().clone() for p in method.parameters()]
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(torch.randn_like(parameter))
    pairs = zip(method.parameters(), global_params, strict=True)
    term = sum((p - start).square().sum() for p, start in pairs)
    expected = torch.autograd.grad(0.3 / 2 * term, list(method.parameters()))
    for parameter in method.parameters():
        parameter.grad = torch.zeros_like(parameter)
    add_proximal_gradient(method, global_params, 0.3)
    for parameter, gradient in zip(method.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_the_federations_statistics_normalize_from_their_share_of_the_run_on(train):
    later = RoundPlan(fraction=1.0, begin=0.5, end=1.0)
    start = make_simclr().state_dict()
    for begins, moves in ((1.0, True), (0.6, True), (0.5, False)):
        method, result = train(plan=later, global_statistics_from=begins)
        moved = {name for name, value in method.state_dict().items() if "running" in name}
        moved = {n for n in moved if not torch.equal(method.state_dict()[n], start[n])}
        assert bool(moved) is moves
        assert math.isfinite(result.loss)
        assert not torch.equal(method.encoder.conv1.weight, start["encoder.conv1.weight"])


def test_momentum_goes_on_where_it_was(train):
    settings = replace(OPTIMIZER, name="muon", momentum_start="averaged")
    zero = zero_momentum(make_simclr(), settings)
    first, begun = train(optimizer=settings, momentum=zero)
    plain, _ = train(optimizer=settings)
    assert state_bytes(first) == state_bytes(plain)  # momentum begins as zero
    assert begun.momentum.keys() == zero.keys()
    again, _ = train(optimizer=settings, momentum=begun.momentum)
    assert state_bytes(again) != state_bytes(plain)


def test_no_gradients_outlive_a_round(train):
    method, _ = train(max_steps=1)
    assert method.training
    assert all(parameter.grad is None for parameter in method.parameters())


def test_the_evaluation_loss_is_repeatable_and_leaves_no_trace(held_out):
    method = make_simclr()
    before = state_bytes(method)
    losses = {held_out(method)[0] for _ in range(2)}
    assert len(losses) == 1
    assert state_bytes(method) == before
    assert held_out(method, seed=9)[0] not in losses


def test_the_evaluation_measures_the_representation(held_out):
    _, found = held_out(make_simclr())
    assert found.keys() == {"alignment", "uniformity", "effective-rank"}
    assert 1 < found["effective-rank"] <= 128  # the projections' size


def test_a_last_batch_of_one_image_joins_its_neighbour(held_out):
    """Alone, it would have no negatives."""
    loss, _ = held_out(make_simclr(), rows=np.arange(33), batch_size=32)
    assert loss > 0


@pytest.mark.skipif(
    choose_dtype("auto", CPU) == torch.float32, reason="this processor has no fast bfloat16"
)
@pytest.mark.parametrize("name", ["sgd", "muon"])
@pytest.mark.slow
@pytest.mark.whole
def test_bfloat16_learns_as_well_as_float32(held_out, train, name):
    """The recorded runs compare the accuracies, which differ too much between short ones."""
    fresh, _ = held_out(train(count=64, max_steps=1)[0])
    gained = {}
    for dtype in (torch.bfloat16, torch.float32):
        optimizer = replace(OPTIMIZER, name=name)
        method, _ = train(count=192, local_epochs=6, dtype=dtype, optimizer=optimizer)
        assert all(p.dtype == torch.float32 for p in method.parameters())
        gained[dtype] = fresh - held_out(method)[0]
    assert gained[torch.bfloat16] == pytest.approx(gained[torch.float32], rel=0.2)


def test_muon_learns_more_than_sgd_in_few_steps(held_out, train):
    losses = {}
    for name in ("sgd", "muon"):
        method, _ = train(count=192, local_epochs=3, optimizer=replace(OPTIMIZER, name=name))
        losses[name], _ = held_out(method)
    assert losses["muon"] < losses["sgd"]


def test_deep_supervision_reports_the_last_stages_loss_and_trains_every_head(train):
    plain, deep = make_simclr(), make_simclr(deep=["layer1", "layer2"])
    start = {name: p.detach().clone() for name, p in deep.deep_heads.named_parameters()}
    results = [train(count=32, max_steps=1, method=method)[1] for method in (plain, deep)]
    assert results[0].loss == pytest.approx(results[1].loss)
    after = dict(deep.deep_heads.named_parameters())
    moved = {name for name, value in start.items() if not torch.equal(after[name], value)}
    assert {f"{stage}.0.weight" for stage in ("layer1", "layer2")} <= moved
