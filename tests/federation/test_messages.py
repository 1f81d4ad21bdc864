"""Weights on the wire: nothing lost, few objects, nothing else let in."""

import io

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from samples import make_simclr

from fedssl.federation.messages import (
    ARRAYS,
    BUFFERS,
    CONFIG,
    PACKED,
    is_packed,
    pack_arrays,
    pack_tensors,
    packed_transport,
    read_state,
    split_state,
    unpack_arrays,
    unpack_tensors,
    write_state,
)
from fedssl.networks.state import load_state

STATE = {"z": torch.tensor([1.5]), "count": torch.tensor(2**40 + 1), "a": torch.eye(2)}


def equal(one, other):
    same_order = list(one) == list(other)
    return same_order and all(
        one[name].dtype == tensor.dtype and torch.equal(one[name], tensor)
        for name, tensor in other.items()
    )


def test_tensors_survive_as_bytes_with_names_order_and_dtypes():
    more = STATE | {"half": torch.ones(3).bfloat16(), "nothing": torch.zeros(0, 2)}
    assert equal(unpack_tensors(pack_tensors(more)), more)
    assert unpack_tensors(pack_tensors({})) == {}


def test_weights_survive_flower_with_their_dtypes():
    method = make_simclr()
    method.encoder.bn1.num_batches_tracked.fill_(2**40 + 1)  # no float32 holds this
    packed = pack_arrays(ArrayRecord(method.state_dict()))
    sent = ArrayRecord.inflate(packed.deflate(), children=packed.children)
    arrays = unpack_arrays(sent)
    other = make_simclr(seed=5)
    load_state(other, arrays.to_torch_state_dict())
    assert equal(other.state_dict(), method.state_dict())


def test_a_model_is_few_objects():
    state = make_simclr().state_dict()
    for tensor in state.values():  # trained: no two arrays alike
        torch.nn.init.normal_(tensor) if tensor.is_floating_point() else tensor.random_()
    plain = ArrayRecord(state)
    packed = len(get_all_nested_objects(pack_arrays(plain)))
    assert packed <= 15
    assert len(get_all_nested_objects(plain)) > 10 * packed


def test_a_channels_last_model_keeps_its_values():
    state = make_simclr().to(memory_format=torch.channels_last).state_dict()
    names = [name for name, tensor in state.items() if tensor.is_floating_point()]
    again = read_state(write_state(state, names))
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("names", [["a", "z"], ["z"], [], list(STATE)])
def test_a_state_is_written_in_the_order_of_the_request_and_read_whole(names):
    content = write_state(STATE, names)
    assert list(content[ARRAYS]) == names
    assert len(content.array_records) == 1
    again = read_state(content)
    assert again.keys() == STATE.keys()
    assert equal({name: again[name] for name in STATE}, STATE)


def test_a_request_carries_its_buffers_beside_the_strategys_settings():
    arrays, buffers = split_state(STATE, ["a"])
    config = ConfigRecord({"server-round": 1, BUFFERS: pack_tensors(buffers)})
    again = read_state(RecordDict({ARRAYS: arrays, CONFIG: config}))
    assert equal({name: again[name] for name in STATE}, STATE)


def without(content, *names):
    for name in names:
        del content[name]
    return content


BROKEN = {
    "no arrays": (lambda c: without(c, ARRAYS), "holds no arrays"),
    "no buffers": (lambda c: without(c, BUFFERS), "holds 0 entries of buffers"),
    "two buffers": (
        lambda c: RecordDict({**c, "more": ConfigRecord({BUFFERS: b""})}),
        "holds 2 entries of buffers",
    ),
    "buffers of text": (
        lambda c: RecordDict({**c, BUFFERS: ConfigRecord({BUFFERS: "text"})}),
        "entries of buffers",
    ),
    "garbage": (
        lambda c: RecordDict({**c, BUFFERS: ConfigRecord({BUFFERS: b"x" * 100})}),
        "can't be read",
    ),
    "twice": (
        lambda c: RecordDict({**c, BUFFERS: ConfigRecord({BUFFERS: pack_tensors(STATE)})}),
        "array 'a' is there twice",
    ),
    "metrics for arrays": (
        lambda c: RecordDict({**c, ARRAYS: ConfigRecord({})}),
        "holds no arrays",
    ),
}


@pytest.mark.parametrize("defect", BROKEN)
def test_a_broken_state_is_refused_with_the_reason(defect):
    change, reason = BROKEN[defect]
    with pytest.raises(ValueError, match=reason):
        read_state(change(write_state(STATE, ["a"])))


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"weights": np.zeros(3)},
        {PACKED: np.zeros(3)},
        {PACKED: b"x" * 100},
        {PACKED: b""},
        {PACKED: pack_tensors({"a": torch.zeros(3, dtype=torch.bfloat16)})},
    ],
    ids=["empty", "other name", "an array", "garbage", "no bytes", "a type that NumPy lacks"],
)
def test_anything_else_is_not_unpacked(record):
    def to_array(value):
        if isinstance(value, bytes):
            return Array("uint8", (len(value),), PACKED, value)
        return Array(value)

    arrays = ArrayRecord({name: to_array(value) for name, value in record.items()})
    with pytest.raises(ValueError, match="safetensors"):
        unpack_arrays(arrays)


def test_arrays_of_any_order_and_shape_come_out_as_they_went_in():
    values = {
        "columns first": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "a number": np.array(7),
        "none": np.zeros((0, 3), dtype=np.float32),
    }
    packed = pack_arrays(ArrayRecord({name: Array(value) for name, value in values.items()}))
    found = unpack_arrays(packed)
    assert list(found) == list(values)
    for name, value in values.items():
        assert found[name].numpy().dtype == value.dtype
        np.testing.assert_array_equal(found[name].numpy(), value)


def test_what_is_no_plain_array_is_not_packed():
    for array in (pickled(), Array("float32", (1,), "other", b"0000")):
        with pytest.raises(ValueError):  # noqa: PT011 (NumPy's own words for pickled objects)
            pack_arrays(ArrayRecord({"a": array}))


def pickled():
    buffer = io.BytesIO()
    np.save(buffer, np.array([print], dtype=object), allow_pickle=True)
    return Array(dtype="object", shape=(1,), stype="numpy.ndarray", data=buffer.getvalue())


def test_pickles_are_refused_packed_and_plain():
    with pytest.raises(ValueError, match=r"can't be read \(it is 'numpy.ndarray'\)"):
        unpack_arrays(ArrayRecord({PACKED: pickled()}))
    content = write_state(STATE, ["a"])
    content[ARRAYS] = ArrayRecord({"a": pickled()})
    with pytest.raises(ValueError, match="can't be read"):
        read_state(content)


def at_the_door(request, answer):
    context = Context(1, 1, {}, RecordDict(), {})
    return packed_transport(request, context, answer)


def test_behind_the_clients_door_arrays_are_plain():
    seen = []

    def answer(message, context):
        seen.append(message.content[ARRAYS].to_torch_state_dict())
        return Message(RecordDict({ARRAYS: ArrayRecord(STATE)}), reply_to=message)

    packed = pack_arrays(ArrayRecord(STATE))
    request = Message(RecordDict({ARRAYS: packed, CONFIG: ConfigRecord({"a": 1})}), 1, "train")
    reply = at_the_door(request, answer)
    assert equal(seen[0], STATE)
    assert is_packed(reply.content[ARRAYS])
    assert equal(unpack_arrays(reply.content[ARRAYS]).to_torch_state_dict(), STATE)


def test_messages_and_replies_without_arrays_pass_the_door():
    def fail(message, context):
        return Message(Error(0, "broken"), reply_to=message)

    def greet(message, context):
        return Message(RecordDict(), reply_to=message)

    assert at_the_door(Message(RecordDict(), 1, "query"), greet).content == RecordDict()
    assert at_the_door(Message(RecordDict(), 1, "query"), fail).error.reason == "broken"


def test_plain_arrays_are_not_let_in_at_the_door():
    request = Message(RecordDict({ARRAYS: ArrayRecord(STATE)}), 1, "train")
    with pytest.raises(ValueError, match="instead of 'safetensors'"):
        at_the_door(request, None)
