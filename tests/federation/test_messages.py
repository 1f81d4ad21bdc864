"""Weights on the wire: nothing lost, few objects, nothing else let in."""

import numpy as np
import pytest
import torch
from conftest import CPU
from flwr.app import Array, ArrayRecord
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from fedssl.federation.messages import PACKED, pack_state, unpack_state
from fedssl.networks.state import load_state
from utils import build_model


def test_weights_survive_flower_with_their_dtypes(config, model):
    model.encoder.bn1.num_batches_tracked.fill_(2**40 + 1)  # no float32 holds this
    record = pack_state(model.state_dict())
    children = record.children
    arrays = ArrayRecord.inflate(record.deflate(), children=children)
    other = build_model(config.model, config.dataset, 5, CPU)
    load_state(other, unpack_state(arrays))
    for name, tensor in model.state_dict().items():
        assert other.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(other.state_dict()[name], tensor), name


def test_a_model_is_few_objects(model):
    for tensor in model.state_dict().values():  # trained: no two arrays alike
        torch.nn.init.normal_(tensor) if tensor.is_floating_point() else tensor.random_()
    packed = len(get_all_nested_objects(pack_state(model.state_dict())))
    apart = len(get_all_nested_objects(ArrayRecord(model.state_dict())))
    assert packed <= 15
    assert apart > 10 * packed


def test_a_channels_last_model_keeps_its_values(model):
    state = model.to(memory_format=torch.channels_last).state_dict()
    again = unpack_state(pack_state(state))
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"weights": np.zeros(3)},
        {PACKED: np.zeros(3)},
        {PACKED: np.frombuffer(b"x" * 100, dtype=np.uint8)},
        {PACKED: np.zeros((2, 2), dtype=np.uint8)},
        {PACKED: np.array([], dtype=np.uint8)},
    ],
    ids=["empty", "other name", "floats", "garbage", "matrix", "no bytes"],
)
def test_anything_else_is_refused(record):
    arrays = ArrayRecord({name: Array(value) for name, value in record.items()})
    with pytest.raises(ValueError, match="safetensors"):
        unpack_state(arrays)


def test_pickles_are_refused():
    array = Array(dtype="object", shape=(1,), stype="numpy.ndarray", data=pickled())
    with pytest.raises(ValueError, match="pickle"):
        unpack_state(ArrayRecord({PACKED: array}))


def pickled():
    import io

    buffer = io.BytesIO()
    np.save(buffer, np.array([print], dtype=object), allow_pickle=True)
    return buffer.getvalue()
