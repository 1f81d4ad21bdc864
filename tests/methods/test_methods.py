"""Every method: the contract, with momentum, deep supervision, bfloat16 and Muon."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from samples import BACKEND, CPU, OPTIMIZER, SETTINGS, VIEWS, WHOLE_RUN, state_bytes

from fedssl.compute import Backend
from fedssl.config.compose import load_config
from fedssl.federation.statistics import expected_moments
from fedssl.methods.base import local_arrays, shared_norm_layers
from fedssl.seeding import generator_for
from fedssl.training.local import local_loss, local_train
from fedssl.training.optimizers import zero_momentum
from fedssl.training.statistics import measure_moments
from utils import build_method

pytestmark = pytest.mark.usefixtures("narrow")

METHODS = ("simclr", "vicreg", "barlow_twins", "simsiam", "moco", "byol")
MUON = replace(OPTIMIZER, name="muon", momentum_start="averaged")


def make_method(name, *overrides):
    return build_method(load_config("config", [f"method={name}", *overrides]), CPU)


def train(method, digits, backend=BACKEND, momentum=None):
    return local_train(
        method,
        digits.train.pixels,
        np.arange(96),
        VIEWS,
        replace(SETTINGS, optimizer=MUON),
        plan=WHOLE_RUN,
        proximal_mu=0.0,
        generator=generator_for(0, "train"),
        backend=backend,
        momentum=momentum,
    )


def hold_out(method, digits, rows, backend=BACKEND):
    return local_loss(
        method,
        digits.train.pixels,
        rows,
        VIEWS,
        batch_size=32,
        generator=generator_for(0, "evaluate"),
        backend=backend,
    )


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_bytes(name, digits):
    first, second = (make_method(name, "model.deep_supervision=[layer3]") for _ in range(2))
    begin = state_bytes(first)
    results = [train(method, digits) for method in (first, second)]
    assert results[0].loss == results[1].loss
    assert state_bytes(first) == state_bytes(second) != begin


@pytest.mark.parametrize("name", METHODS)
def test_what_stays_with_the_client_is_in_nothing_that_travels(name, digits):
    method = make_method(name, "model.deep_supervision=[layer2]")
    local = method.local_names()
    assert bool(local) == (name in ("moco", "byol"))
    momentum = zero_momentum(method, MUON)
    result = train(method, digits, momentum=momentum)
    assert result.momentum.keys() == momentum.keys()
    moments = measure_moments(
        method,
        digits.train.pixels,
        np.arange(64),
        VIEWS,
        8,
        batch_size=32,
        generator=generator_for(0, "statistics"),
        backend=BACKEND,
    )
    assert moments.keys() == expected_moments(method).keys()
    assert shared_norm_layers(method)
    told = [*method.shared_state(), *momentum, *moments]
    own = {part for name in local for part in (name, name.rpartition(".")[0] or name)}
    for array in told:
        bare = array.removeprefix("momentum.").removeprefix("views.").removeprefix("whole.")
        assert bare not in own
        assert bare.removesuffix(".mean").removesuffix(".square") not in own


@pytest.mark.parametrize("name", METHODS)
def test_losses_are_finite_in_bfloat16_and_held_out(name, digits):
    method = make_method(name, "model.deep_supervision=[layer2,layer3]")
    backend = Backend(CPU, torch.bfloat16)
    assert np.isfinite(train(method, digits, backend).loss)
    loss, representation = hold_out(method, digits, np.arange(96, 160), backend)
    assert np.isfinite(loss)
    assert representation["effective-rank"] > 1


def test_mocos_queue_holds_the_newest_keys_and_its_key_encoder_follows(digits):
    method = make_method("moco", "method.queue_size=100", "method.momentum=0.5")
    before = local_arrays(method)
    train(method, digits)  # three steps of 64 views
    after = local_arrays(method)
    assert int(after["place"]) == 3 * 64 % 100
    changed = (before["queues"] != after["queues"]).any(dim=2)
    assert changed.all()
    lengths = after["queues"].norm(dim=2)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))
    name = "target.encoder.conv1.weight"
    own = method.encoder.conv1.weight.detach()
    start = before[name]
    assert 0 < float((after[name] - own).norm()) < float((start - own).norm())


def test_moco_changes_no_queue_on_held_out_images(digits):
    method = make_method("moco")
    before = local_arrays(method)
    hold_out(method, digits, np.arange(64))
    method.after_step(1.0)
    after = local_arrays(method)
    assert torch.equal(before["queues"], after["queues"])
    assert int(after["place"]) == 0
