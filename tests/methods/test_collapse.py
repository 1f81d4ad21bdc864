"""What the warnings of a collapse mean with each method: each was made to collapse."""

from dataclasses import replace

import numpy as np
import pytest
from samples import BACKEND, CPU, OPTIMIZER, SETTINGS, VIEWS, WHOLE_RUN

from fedssl.config.compose import load_config
from fedssl.federation.monitoring import find_warnings
from fedssl.methods.simsiam import distance
from fedssl.runs.metrics import RoundMetrics
from fedssl.seeding import generator_for
from fedssl.training.local import local_loss, local_train
from utils import build_method

HEALTHY = {"learning_rate": 0.05}
HARD = {"learning_rate": 0.3}


def attract_alone(method):
    """Leave out what keeps different images apart."""
    method.compare = lambda projections, views: [
        distance(each, each.roll(len(each) // 2, dims=0)) for each in projections
    ]


def let_gradients_through(method):
    method.targets = lambda projections, views: list(projections)


def take_no_negatives(method):
    method.queues.zero_()
    method.after_step = lambda progress: method.target.follow(method, 0.5)


def let_variance_go(method):
    method.weights = (25.0, 0.0, 0.0)


def ask_for_redundancy(method):
    method.redundancy, method.scale = -1.0, 0.001


def do_nothing(method):
    pass


BROKEN = {  # how, and in how many steps
    "simclr": (attract_alone, 40),
    "vicreg": (let_variance_go, 200),
    "barlow_twins": (ask_for_redundancy, 120),
    "simsiam": (let_gradients_through, 40),
    "moco": (take_no_negatives, 40),
    "byol": (let_gradients_through, 40),
}


def warnings_of(name, breaks, steps, rates, digits):
    method = build_method(load_config("config", [f"method={name}", "model.stem=imagenet"]), CPU)
    breaks(method)
    optimizer = replace(OPTIMIZER, **rates)
    local_train(
        method,
        digits.train.pixels,
        np.arange(1000),
        VIEWS,
        replace(SETTINGS, local_epochs=20, max_steps=steps, optimizer=optimizer),
        plan=WHOLE_RUN,
        proximal_mu=0.0,
        generator=generator_for(0, "train"),
        backend=BACKEND,
    )
    _, measured = local_loss(
        method,
        digits.train.pixels,
        np.arange(1000, 1200),
        VIEWS,
        batch_size=100,
        generator=generator_for(0, "evaluate"),
        backend=BACKEND,
    )
    numbers = {"uniformity": measured["uniformity"], "effective_rank": measured["effective-rank"]}
    return find_warnings(RoundMetrics(1, **numbers))


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_a_method_that_collapses_is_told_from_one_that_learns(name, digits):
    breaks, steps = BROKEN[name]
    (warning,) = warnings_of(name, breaks, steps, HARD, digits)
    assert "has collapsed to a point" in warning
    assert warnings_of(name, do_nothing, 40, HEALTHY, digits) == []
