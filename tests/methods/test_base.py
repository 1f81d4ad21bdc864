"""A method of somebody else, with a momentum target that stays with the client."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from samples import BACKEND, OPTIMIZER, SETTINGS, VIEWS, make_encoder
from torch import nn

from fedssl.federation.aggregation import arrays_for_strategy
from fedssl.methods.base import Losses, Method, local_arrays
from fedssl.seeding import generator_for
from fedssl.training.local import local_loss, local_train
from fedssl.training.schedule import RoundPlan


class Toy(Method):
    """Predicts a slowly moving copy of itself, as BYOL does, much shortened."""

    def __init__(self, encoder, momentum=0.9):
        super().__init__()
        self.encoder, self.momentum = encoder, momentum
        self.predictor = nn.Linear(encoder.feature_size, 8)
        self.target = copy.deepcopy(self.predictor).requires_grad_(False)
        self.progress, self.modes = [], []

    def loss(self, views):
        self.modes.append(self.training)
        features = self.encoder(views)
        online, target = self.predictor(features), self.target(features.detach())
        first, second = target.chunk(2)
        closeness = F.cosine_similarity(online, torch.cat([second, first])).mean()
        loss = 2 - 2 * closeness
        return Losses(loss, loss.detach(), online.detach())

    @torch.no_grad()
    def after_step(self, progress):
        self.progress.append(progress)
        pairs = zip(self.target.parameters(), self.predictor.parameters(), strict=True)
        for slow, fast in pairs:
            slow.lerp_(fast, 1 - self.momentum)

    def local_names(self):
        return frozenset(f"target.{name}" for name in self.target.state_dict())


@pytest.fixture
def toy():
    torch.manual_seed(0)
    return Toy(make_encoder())


def train(method, digits, plan, optimizer="sgd", proximal_mu=0.0):
    return local_train(
        method,
        digits.train.pixels,
        np.arange(96),
        VIEWS,
        replace(SETTINGS, optimizer=replace(OPTIMIZER, name=optimizer)),
        plan=plan,
        proximal_mu=proximal_mu,
        generator=generator_for(0, "test"),
        backend=BACKEND,
    )


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_it_trains_and_is_told_of_every_step(toy, digits, optimizer):
    start = {name: tensor.clone() for name, tensor in toy.state_dict().items()}
    result = train(toy, digits, RoundPlan(1.0, 0.4, 0.7), optimizer, proximal_mu=0.1)
    assert 0 < result.loss < 4
    assert toy.progress == pytest.approx([0.4, 0.5, 0.6])
    assert toy.modes == [True] * 3
    moved = [name for name, tensor in toy.state_dict().items() if not tensor.equal(start[name])]
    assert {"predictor.weight", "target.weight", "encoder.conv1.weight"} <= set(moved)


def test_after_step_follows_the_step_and_alone_moves_the_target(toy, digits):
    start = {name: tensor.clone() for name, tensor in toy.state_dict().items()}
    train(toy, digits, RoundPlan(1 / 3, 0.0, 1.0))
    assert len(toy.progress) == 1
    expected = torch.lerp(start["target.weight"], toy.predictor.weight.detach(), 0.1)
    torch.testing.assert_close(toy.target.weight.detach(), expected)
    assert not toy.predictor.weight.equal(start["predictor.weight"])


def test_its_held_out_loss_is_taken_in_eval_mode(toy, digits):
    options = {"batch_size": 32, "generator": generator_for(0, "evaluate"), "backend": BACKEND}
    loss, found = local_loss(toy, digits.train.pixels, np.arange(40), VIEWS, **options)
    assert 0 < loss < 4
    assert found["effective-rank"] >= 1
    assert not any(toy.modes)
    assert toy.progress == []


def test_the_target_never_travels(toy):
    shared = toy.shared_state()
    assert not any(name.startswith("target") for name in shared)
    assert local_arrays(toy).keys() == {"target.weight", "target.bias"}
    for acts_on in ("parameters", "floats"):
        names = arrays_for_strategy(toy, acts_on)
        assert names
        assert set(names) <= shared.keys()


def test_a_method_must_have_a_loss():
    class Unfinished(Method):
        pass

    with pytest.raises(TypeError, match="loss"):
        Unfinished()


def test_by_default_nothing_stays_and_nothing_follows_a_step():
    class Plain(Method):
        def loss(self, views):
            raise NotImplementedError

    method = Plain()
    method.encoder = make_encoder()
    assert list(method.shared_state()) == list(method.state_dict())
    assert method.after_step(0.5) is None
