from dataclasses import replace

import numpy as np
import pytest
import torch

from fedssl.compute import choose_dtype
from fedssl.config.compose import CONF, load_config
from fedssl.data.views import make_augmentation
from fedssl.seeding import generator_for
from fedssl.training.local import hold_images, local_loss, local_train
from fedssl.training.optimizers import Optimization, make_optimization, make_optimizers
from fedssl.training.schedule import view_size
from utils import build_model

CPU = torch.device("cpu")


@pytest.fixture
def settings():
    return Optimization(
        local_epochs=1,
        batch_size=32,
        max_steps=0,
        optimizer="sgd",
        learning_rate=0.05,
        momentum=0.9,
        weight_decay=5e-4,
        muon_learning_rate=0.05,
        muon_momentum=0.95,
        temperature=0.5,
    )


@pytest.fixture
def train(config, digits, settings):
    """Train a fresh model on the first images; return it with the result."""
    augmentation = make_augmentation(config.augment, 8)

    def run(
        count=64,
        seed=0,
        proximal_mu=0.0,
        dtype=torch.float32,
        length=1.0,
        run_part=(0, 1),
        pixels=None,
        **changes,
    ):
        model = build_model(config.model, config.dataset, 0, CPU)
        result = local_train(
            model,
            digits.train.pixels if pixels is None else pixels,
            np.arange(count),
            augmentation,
            replace(settings, **changes),
            length=length,
            run_part=run_part,
            proximal_mu=proximal_mu,
            generator=generator_for(seed, "test"),
            device=CPU,
            dtype=dtype,
        )
        return model, result

    return run


def state_bytes(model):
    return b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())


def distance(model, other):
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return sum(float((a - b).detach().square().sum()) for a, b in pairs) ** 0.5


def held_out_loss(config, digits, model, seed=0):
    loss, _ = local_loss(
        model,
        digits.train.pixels,
        np.arange(200, 280),
        make_augmentation(config.augment, 8),
        batch_size=32,
        temperature=0.5,
        generator=generator_for(seed, "evaluate"),
        device=CPU,
        dtype=torch.float32,
    )
    return loss


EXPERIMENTS = [file.stem for file in (CONF / "experiment").glob("*.yaml")]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_trains_a_step(experiment, rng):
    config = load_config("config", [f"experiment={experiment}", "train.batch_size=4"])
    size = view_size(config.train.view_sizes, config.dataset.image_size, 1, config.num_rounds)
    side = config.dataset.image_size
    result = local_train(
        build_model(config.model, config.dataset, 0, CPU),
        rng.integers(0, 256, (8, 3, side, side), dtype=np.uint8),
        np.arange(8),
        make_augmentation(config.augment, size),
        replace(make_optimization(config.train), max_steps=1),
        length=1.0,
        run_part=(0, 1),
        proximal_mu=0.0,
        generator=generator_for(0, "test"),
        device=CPU,
        dtype=torch.float32,
    )
    assert 0 < result.loss < 10
    assert config.dataset.name == experiment.partition("_")[0]


def test_training_lowers_the_loss_of_unseen_images(config, digits, train):
    untrained = build_model(config.model, config.dataset, 0, CPU)
    trained, result = train(count=192, local_epochs=3)
    assert result.images == 3 * 192
    assert result.images_per_second > 0
    before, after = (held_out_loss(config, digits, m) for m in (untrained, trained))
    assert after < before - 0.1


def test_the_seed_decides_the_bytes(train):
    first, again, other = train(seed=1)[0], train(seed=1)[0], train(seed=2)[0]
    assert state_bytes(first) == state_bytes(again)
    assert state_bytes(first) != state_bytes(other)


def test_images_held_as_a_tensor_give_the_same_bytes(train, digits):
    """As a GPU holds them."""
    held = train(pixels=torch.from_numpy(np.array(digits.train.pixels)))[0]
    assert state_bytes(held) == state_bytes(train()[0])
    assert hold_images(digits.train.pixels, CPU) is digits.train.pixels


@pytest.mark.parametrize(("count", "images"), [(2, 2), (31, 31), (33, 32), (70, 64)])
def test_a_client_uses_the_batches_it_can_fill(train, count, images):
    assert train(count=count)[1].images == images


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_images_are_refused(train, count):
    with pytest.raises(ValueError, match=f"has {count}"):
        train(count=count)


def test_max_steps_ends_a_round_early(train):
    assert train(count=96, local_epochs=5, max_steps=4)[1].images == 4 * 32


def test_a_short_round_takes_its_share_of_the_steps(train):
    assert train(count=96, local_epochs=5, max_steps=10, length=0.3)[1].images == 3 * 32
    assert train(count=96, local_epochs=1, length=0.01)[1].images == 32


def test_the_rate_falls_over_the_whole_run(train, config):
    start = build_model(config.model, config.dataset, 0, CPU)
    early, _ = train(run_part=(0, 0.1), weight_decay=0.0)
    late, _ = train(run_part=(0.9, 1.0), weight_decay=0.0)
    assert distance(late, start) < 0.2 * distance(early, start)


@pytest.mark.parametrize(
    ("optimizer", "remedy"),
    [("sgd", "train.learning_rate"), ("muon", "train.learning_rate or train.muon_learning_rate")],
)
def test_a_diverged_loss_is_an_error_that_names_the_remedy(train, optimizer, remedy):
    with pytest.raises(FloatingPointError, match=f"lower {remedy}$"):
        train(optimizer=optimizer, learning_rate=1e30, muon_learning_rate=1e30, local_epochs=3)


def test_fedprox_keeps_the_weights_near_the_global_ones(train, config):
    start = build_model(config.model, config.dataset, 0, CPU)
    free, _ = train(local_epochs=8, learning_rate=0.02)
    tied, _ = train(local_epochs=8, learning_rate=0.02, proximal_mu=5.0)
    assert distance(tied, start) < 0.6 * distance(free, start)


def test_fedprox_adds_the_gradient_of_its_term(config):
    from fedssl.training.local import _pull

    model = build_model(config.model, config.dataset, 0, CPU)
    anchor = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    term = sum((p - a).square().sum() for p, a in zip(model.parameters(), anchor, strict=True))
    expected = torch.autograd.grad(0.3 / 2 * term, list(model.parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    _pull(model, anchor, 0.3)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_the_evaluation_loss_is_repeatable_and_leaves_no_trace(config, digits, model):
    before = state_bytes(model)
    losses = {held_out_loss(config, digits, model) for _ in range(2)}
    assert len(losses) == 1
    assert state_bytes(model) == before
    assert held_out_loss(config, digits, model, seed=9) not in losses


def test_the_settings_come_from_the_configuration(config):
    assert make_optimization(config.train).batch_size == config.train.batch_size


@pytest.mark.skipif(
    choose_dtype("auto", CPU) == torch.float32, reason="this processor has no fast bfloat16"
)
@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_bfloat16_learns_as_well_as_float32(config, digits, train, optimizer):
    """The recorded runs compare the accuracies, which differ too much between short ones."""
    fresh = held_out_loss(config, digits, train(count=64, max_steps=1)[0])
    gained = {}
    for dtype in (torch.bfloat16, torch.float32):
        model, _ = train(count=192, local_epochs=6, dtype=dtype, optimizer=optimizer)
        assert all(p.dtype == torch.float32 for p in model.parameters())
        gained[dtype] = fresh - held_out_loss(config, digits, model)
    assert gained[torch.bfloat16] == pytest.approx(gained[torch.float32], rel=0.2)


def test_muon_moves_the_inner_weights_and_sgd_all_else(config, settings):
    model = build_model(config.model, config.dataset, 0, CPU)
    (sgd,) = make_optimizers(model, settings)
    assert len(sgd.param_groups[0]["params"]) == len(list(model.parameters()))
    sgd, muon = make_optimizers(model, replace(settings, optimizer="muon"))
    layers = (torch.nn.Conv2d, torch.nn.Linear)
    weights = {layer.weight for layer in model.modules() if isinstance(layer, layers)}
    assert set(muon.param_groups[0]["params"]) == weights - {model.encoder.conv1.weight}
    both = [*sgd.param_groups[0]["params"], *muon.param_groups[0]["params"]]
    assert sorted(map(id, both)) == sorted(map(id, model.parameters()))


def test_muon_learns_more_than_sgd_in_few_steps(config, digits, train):
    losses = {
        name: held_out_loss(config, digits, train(count=192, local_epochs=3, optimizer=name)[0])
        for name in ("sgd", "muon")
    }
    assert losses["muon"] < losses["sgd"]


def test_deep_supervision_reports_the_last_stages_loss_and_trains_every_head(
    config, digits, settings
):
    results, heads = [], []
    for deep in ([], ["layer1", "layer2"]):
        config.model.deep_supervision = deep
        model = build_model(config.model, config.dataset, 0, CPU)
        heads.append({n: p.detach().clone() for n, p in model.deep_heads.named_parameters()})
        one_step = replace(settings, max_steps=1)
        results.append(
            local_train(
                model,
                digits.train.pixels,
                np.arange(32),
                make_augmentation(config.augment, 8),
                one_step,
                length=1.0,
                run_part=(0, 1),
                proximal_mu=0.0,
                generator=generator_for(0, "test"),
                device=CPU,
                dtype=torch.float32,
            )
        )
    assert results[0].loss == pytest.approx(results[1].loss)
    after = dict(model.deep_heads.named_parameters())
    assert {name.partition(".")[0] for name in after} == {"layer1", "layer2"}
    moved = [n for n, start in heads[1].items() if not torch.equal(after[n], start)]
    assert {f"{stage}.0.weight" for stage in ("layer1", "layer2")} <= set(moved)
