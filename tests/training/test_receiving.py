"""How a client takes the global model: against the formulas of FedEMA and FedU."""

import pytest
import torch
from samples import CPU

from fedssl.config.compose import load_config
from fedssl.errors import UserError
from fedssl.training.receiving import FedEMA, FedU, Replace, distance, length
from utils import build_method, build_receiving

NAMES = ("encoder.conv1.weight", "predictors.0.weight", "encoder.bn1.running_var")


def make_state(weight, predictor=0.0, statistic=1.0, count=3):
    values = (torch.full((2, 2), weight), torch.full((3,), predictor), torch.full((2,), statistic))
    counter = {"encoder.bn1.num_batches_tracked": torch.tensor(count)}
    return dict(zip(NAMES, values, strict=True)) | counter


def test_the_distance_is_that_of_the_encoders_weights():
    assert distance(make_state(1.0), make_state(4.0, 9.0, 9.0, 9)) == 6.0  # sqrt(4 * 3 ** 2)
    assert length(make_state(2.0, 9.0)) == 4.0


def test_replace_takes_what_was_sent():
    sent = make_state(1.0)
    assert Replace().receive(sent, make_state(2.0), {}) == sent


def test_fedemas_share_follows_the_distance():
    receiving, memory = FedEMA(first_share=0.5), {}
    first = receiving.receive(make_state(0.0, 0.0, 1.0, 7), make_state(2.0, 4.0, 3.0), memory)
    assert float(memory["rate"]) == 0.5 / 4.0
    assert torch.equal(first[NAMES[0]], torch.full((2, 2), 1.0))
    assert torch.equal(first[NAMES[1]], torch.full((3,), 2.0))
    assert torch.equal(first[NAMES[2]], torch.full((2,), 2.0))
    assert int(first["encoder.bn1.num_batches_tracked"]) == 7
    nearer = receiving.receive(make_state(0.0), make_state(1.0), memory)  # half as far: 0.25
    assert torch.equal(nearer[NAMES[0]], torch.full((2, 2), 0.25))
    further = receiving.receive(make_state(0.0), make_state(8.0), memory)  # never above 1
    assert torch.equal(further[NAMES[0]], torch.full((2, 2), 8.0))


def test_fedema_of_equal_models_takes_what_was_sent():
    sent, memory = make_state(1.0), {}
    received = FedEMA(0.7).receive(sent, make_state(1.0), memory)
    assert all(torch.equal(received[name], sent[name]) for name in sent)


def test_fedemas_rate_waits_for_a_model_of_others():
    receiving, memory = FedEMA(0.7), {}
    for own in (make_state(1.0), make_state(1.0005)):  # its own again, and rounded on the way
        received = receiving.receive(make_state(1.0), own, memory)
        assert torch.equal(received[NAMES[0]], make_state(1.0)[NAMES[0]])
        assert memory == {}
    receiving.receive(make_state(1.0), make_state(2.0), memory)
    assert float(memory["rate"]) == pytest.approx(0.7 / 2.0)


def test_fedu_keeps_predictors_where_the_encoders_are_far_apart():
    sent, own = make_state(1.0, 1.0), make_state(1.5, 2.0)  # half of the length apart
    near = FedU(threshold=0.6).receive(sent, own, {})
    far = FedU(threshold=0.4).receive(sent, own, {})
    assert near == sent
    assert torch.equal(far[NAMES[1]], own[NAMES[1]])
    assert all(torch.equal(far[name], sent[name]) for name in sent if name != NAMES[1])


def test_fedu_asks_for_predictors_in_a_line():
    config = load_config("config", ["receive=fedu"])
    with pytest.raises(UserError, match="SimCLR has no predictors") as error:
        build_receiving(config, build_method(config, CPU))
    assert "\n" not in str(error.value)
    config = load_config("config", ["receive=fedu", "method=byol"])
    assert isinstance(build_receiving(config, build_method(config, CPU)), FedU)
