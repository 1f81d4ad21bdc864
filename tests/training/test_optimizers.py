"""Which optimizer moves which weights."""

from dataclasses import replace

import torch
from samples import OPTIMIZER, make_simclr

from fedssl.training.muon import Muon
from fedssl.training.optimizers import build_optimizers


def test_sgd_moves_all_weights_at_the_settings():
    method = make_simclr(deep=["layer2"])
    (sgd,) = build_optimizers(method, OPTIMIZER)
    (group,) = sgd.param_groups
    assert isinstance(sgd, torch.optim.SGD)
    assert list(map(id, group["params"])) == list(map(id, method.parameters()))
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.05, 0.9, 5e-4)


def test_muon_moves_the_inner_weights_and_sgd_all_else():
    method = make_simclr(deep=["layer2"])
    sgd, muon = build_optimizers(method, replace(OPTIMIZER, name="muon"))
    layers = (torch.nn.Conv2d, torch.nn.Linear)
    weights = {layer.weight for layer in method.modules() if isinstance(layer, layers)}
    assert set(muon.param_groups[0]["params"]) == weights - {method.encoder.conv1.weight}
    both = [*sgd.param_groups[0]["params"], *muon.param_groups[0]["params"]]
    assert sorted(map(id, both)) == sorted(map(id, method.parameters()))
    assert isinstance(muon, Muon)
    (group,) = muon.param_groups
    assert (group["lr"], group["momentum"]) == (0.05, 0.95)


def test_muon_multiplies_in_the_type_that_it_is_given():
    settings = replace(OPTIMIZER, name="muon")
    assert build_optimizers(make_simclr(), settings)[1].dtype == torch.float32
    assert build_optimizers(make_simclr(), settings, torch.bfloat16)[1].dtype == torch.bfloat16


def test_the_rates_are_named_for_messages():
    assert OPTIMIZER.rates == ["optimizer.learning_rate"]
    both = ["optimizer.learning_rate", "optimizer.muon_learning_rate"]
    assert replace(OPTIMIZER, name="muon").rates == both
