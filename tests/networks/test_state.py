"""States are loaded whole, by name, or not at all."""

import pytest
import torch
from samples import make_encoder, state_bytes

from fedssl.networks.state import load_state


def test_a_state_comes_over_whole():
    source, target = make_encoder(seed=1), make_encoder(seed=2)
    source.bn1.num_batches_tracked.fill_(2**40 + 1)  # no float32 holds this
    load_state(target, source.state_dict())
    assert state_bytes(target) == state_bytes(source)


def test_the_order_of_the_names_does_not_matter():
    source, target = make_encoder(seed=1), make_encoder(seed=2)
    load_state(target, dict(reversed(source.state_dict().items())))
    assert state_bytes(target) == state_bytes(source)


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        ("missing", r"missing array 'bn1\.weight' \(1 names differ\)"),
        ("unknown", r"unknown array 'bn1\.extra' \(1 names differ\)"),
        ("shape", r"array 'bn1\.weight' has shape \(3,\) instead of \(64,\)"),
    ],
)
def test_a_wrong_state_is_named_and_nothing_is_loaded(defect, message):
    model = make_encoder()
    before = state_bytes(model)
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    if defect == "missing":
        del state["bn1.weight"]
    elif defect == "unknown":
        state["bn1.extra"] = torch.zeros(1)
    else:
        state["bn1.weight"] = torch.zeros(3)
    with pytest.raises(ValueError, match=message):
        load_state(model, state)
    assert state_bytes(model) == before
