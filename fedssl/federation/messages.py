"""What messages carry, and how their arrays travel: packed into one, for few requests.

Flower sends every array as objects of its own, each with its own requests; on a slow
network their number costs more than their bytes (benchmarks/performance/wire.py). Packing
happens between the grid and the rest of the server, and at the door of the client, so
that strategies, guards and Flower's mods see plain arrays, also where these travel rounded
(fedssl/federation/wire.py).

A message carries in `arrays` what the strategy acts on, and in the entry `buffers` of a
config record the rest of the model's state, such as BatchNorm's counters, which neither
a server optimizer nor a clipping mod may touch.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from flwr.common.constant import ErrorCode, SType
from safetensors import SafetensorError, numpy
from safetensors.torch import load, save
from torch import Tensor

from fedssl.federation.wire import Wire, add_update, compress, decode, decompress, encode

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"  # records of a message
RUN = "run"  # an entry of the config record: which run this is, 32 hex digits
BUFFERS = "buffers"  # an entry of the config record, and the config record of a reply
PACKED = "safetensors"
ROUNDED = "rounded safetensors"  # the kind of a packed array that is rounded and compressed
ABSENCES = (  # error codes of messages that no client has answered
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ErrorCode.NODE_UNAVAILABLE,
)
DIED = "its process died, killed or for want of memory"
UNREADABLE = (SafetensorError, TypeError, ValueError, EOFError, KeyError, AttributeError)
MORE_BYTES = 64 * 2**20  # by which a reply may be larger than the message that it answers
MOST_BYTES = 2**34  # that a message may have once it is decompressed
NUMBER = 8  # bytes of a number
MAX_HEADER = 2**16  # bytes before the values of an array, at most
MAX_REASON = 300  # characters of what a client says of its failure


def pack_tensors(state: Mapping[str, Tensor]) -> bytes:
    """Write tensors with their names, order, shapes and dtypes as bytes."""
    ordered = {f"{place:05d} {name}": value for place, (name, value) in enumerate(state.items())}
    return save({name: value.contiguous() for name, value in ordered.items()})


def unpack_tensors(data: bytes) -> dict[str, Tensor]:
    """Read what `pack_tensors` wrote; nothing is unpickled.

    Raises:
        ValueError: the bytes are something else.
    """
    try:
        found = load(data)
    except UNREADABLE as error:
        raise ValueError(f"{PACKED!r} can't be read ({error})") from error
    return {name.partition(" ")[2]: found[name] for name in sorted(found)}


def pack_arrays(arrays: ArrayRecord, wire: Wire = "float32") -> ArrayRecord:
    """Put all arrays of a record, with names, order, shapes and dtypes, into one of bytes."""
    if wire != "float32":
        return pack_rounded(encode(arrays.to_torch_state_dict(), wire))
    ordered = {f"{place:05d} {name}": _view(arrays[name]) for place, name in enumerate(arrays)}
    data = numpy.save(ordered)
    return ArrayRecord({PACKED: Array("uint8", (len(data),), PACKED, data)})


def pack_rounded(coded: Mapping[str, Tensor]) -> ArrayRecord:
    """Put rounded arrays into one of compressed bytes."""
    data = compress(pack_tensors(coded))
    return ArrayRecord({PACKED: Array("uint8", (len(data),), ROUNDED, data)})


def _view(array: Array) -> np.ndarray:
    """Look at the values of an array, by rows, where they lie; Flower's own way copies them.

    Raises:
        ValueError: it holds something else, such as pickled objects.
    """
    header = io.BytesIO(array.data[:MAX_HEADER])
    if array.stype != SType.NUMPY or np.lib.format.read_magic(header) != (1, 0):
        raise ValueError(f"an array is {array.stype!r}, not NumPy's of version 1")
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(header)
    values = np.frombuffer(array.data, dtype, offset=header.tell())
    return np.asarray(values.reshape(shape, order="F" if by_columns else "C"), order="C")


def is_packed(arrays: ArrayRecord) -> bool:
    """Tell whether a record has the form that `pack_arrays` gives."""
    return list(arrays) == [PACKED]


def unpack_arrays(arrays: ArrayRecord) -> ArrayRecord:
    """Take the arrays out again; nothing is unpickled.

    Raises:
        ValueError: the record holds something else.
    """
    if not is_packed(arrays):
        raise ValueError(f"arrays {sorted(arrays)[:3]} instead of {PACKED!r}")
    if (kind := arrays[PACKED].stype) == ROUNDED:
        return ArrayRecord(decode(_unpack_rounded(arrays, MOST_BYTES)))
    if kind != PACKED:
        raise ValueError(f"{PACKED!r} can't be read (it is {kind!r})")
    try:
        found = numpy.load(arrays[PACKED].data)
    except UNREADABLE as error:
        raise ValueError(f"{PACKED!r} can't be read ({error})") from error
    return ArrayRecord({name.partition(" ")[2]: Array(found[name]) for name in sorted(found)})


def unpack_update(arrays: ArrayRecord, start: ArrayRecord | None) -> ArrayRecord:
    """Take the arrays of a reply out of their packing; of a change, add it to the start.

    Args:
        start: the exact arrays of the message; None if it had none.

    Raises:
        ValueError: the record holds something else.
    """
    if not is_packed(arrays) or arrays[PACKED].stype != ROUNDED:
        return unpack_arrays(arrays)
    if start is None:
        raise ValueError("the reply changes arrays that nobody sent")
    most = sum(len(array.data) for array in start.values()) + MORE_BYTES
    return ArrayRecord(add_update(start.to_torch_state_dict(), _unpack_rounded(arrays, most)))


def _unpack_rounded(arrays: ArrayRecord, most: int) -> dict[str, Tensor]:
    return unpack_tensors(decompress(arrays[PACKED].data, most))


def split_state(
    state: Mapping[str, Tensor], names: Sequence[str]
) -> tuple[ArrayRecord, dict[str, Tensor]]:
    """Split a state into the arrays that the strategy acts on, in their order, and the rest."""
    rest = {name: value for name, value in state.items() if name not in set(names)}
    return ArrayRecord({name: state[name] for name in names}), rest


def write_state(state: Mapping[str, Tensor], names: Sequence[str]) -> RecordDict:
    """Put a model's state into the records of a reply.

    Args:
        names: the arrays of the request, which the reply must have too.
    """
    arrays, buffers = split_state(state, names)
    return RecordDict({ARRAYS: arrays, **write_tensors(buffers)})


def write_tensors(tensors: Mapping[str, Tensor]) -> dict[str, ConfigRecord]:
    """Put tensors that no strategy acts on into the records of a reply."""
    return {BUFFERS: ConfigRecord({BUFFERS: pack_tensors(tensors)})}


def read_tensors(content: RecordDict, what: str) -> dict[str, Tensor]:
    """Read what `write_tensors` wrote.

    Args:
        what: to call it where it is missing.

    Raises:
        ValueError: it is missing, or something else.
    """
    record = content.get(BUFFERS)
    data = record.get(BUFFERS) if isinstance(record, ConfigRecord) else None
    if not isinstance(data, bytes):
        raise ValueError(f"the reply holds no {what}")
    return unpack_tensors(data)


def read_array_record(content: RecordDict) -> dict[str, Tensor]:
    """Read the arrays of a message or a reply, without the buffers beside them.

    Raises:
        ValueError: it holds none, or something else.
    """
    arrays = content.get(ARRAYS)
    if not isinstance(arrays, ArrayRecord):
        raise ValueError("the message holds no arrays")
    try:
        return dict(arrays.to_torch_state_dict())
    except (TypeError, ValueError, EOFError) as error:
        raise ValueError(f"arrays can't be read ({error})") from error


def read_state(content: RecordDict) -> dict[str, Tensor]:
    """Read a model's state out of a message or a reply.

    Raises:
        ValueError: it holds none.
    """
    state = read_array_record(content)
    buffers = [record[BUFFERS] for record in content.config_records.values() if BUFFERS in record]
    if len(buffers) != 1 or not isinstance(buffers[0], bytes):
        raise ValueError(f"the message holds {len(buffers)} entries of buffers")
    rest = unpack_tensors(buffers[0])
    if twice := sorted(state.keys() & rest.keys()):
        raise ValueError(f"array {twice[0]!r} is there twice")
    return state | rest


def pack_messages(messages: Iterable[Message], wire: Wire = "float32") -> list[Message]:
    """Pack the arrays of messages for the way; those that share a record are packed once."""
    packed: dict[int, ArrayRecord] = {}
    messages = list(messages)
    for message in messages:
        arrays = message.content.get(ARRAYS)
        if not isinstance(arrays, ArrayRecord) or is_packed(arrays):  # sent before
            continue
        if id(arrays) not in packed:
            packed[id(arrays)] = pack_arrays(arrays, wire)
        message.content = RecordDict({**message.content, ARRAYS: packed[id(arrays)]})
    return messages


def count_bytes(content: RecordDict) -> int:
    """Count the bytes of all that a message's records hold."""
    arrays = (array for each in content.array_records.values() for array in each.values())
    entries: list[Any] = [v for each in content.config_records.values() for v in each.values()]
    entries += [v for each in content.metric_records.values() for v in each.values()]
    parts = [part for e in entries for part in (e if isinstance(e, list) else [e])]
    texts = sum(len(part) if isinstance(part, bytes | str) else NUMBER for part in parts)
    return texts + sum(len(array.data) for array in arrays)


def unpack_reply(reply: Message, most: int, start: ArrayRecord | None) -> None:
    """Take the arrays of a reply, if it has any, out of their packing.

    Args:
        most: bytes that it may have.
        start: the exact arrays of the message that it answers, if that had any.

    Raises:
        ValueError: they are something else, or more.
    """
    if (size := count_bytes(reply.content)) > most:
        raise ValueError(f"its reply has {size / 1e6:,.1f} MB, over {most / 1e6:,.1f}")
    if isinstance(arrays := reply.content.get(ARRAYS), ArrayRecord):
        reply.content[ARRAYS] = unpack_update(arrays, start)


def repeat_message(message: Message) -> Message:
    """Make the same message anew; Flower gives each an identity of its own."""
    metadata = message.metadata
    return Message(
        message.content, metadata.dst_node_id, metadata.message_type, group_id=metadata.group_id
    )


def packed_transport(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Unpack a message at the client's door, and pack its reply: the outermost of Flower's mods."""
    if ARRAYS in message.content:
        message.content[ARRAYS] = unpack_arrays(message.content.array_records[ARRAYS])
    reply = call_next(message, context)
    if reply.has_content() and ARRAYS in reply.content:
        arrays = reply.content.array_records[ARRAYS]
        reply.content[ARRAYS] = arrays if is_packed(arrays) else pack_arrays(arrays)
    return reply


def explain(error: Error) -> str:
    """Say in one line what an error reply means.

    Flower wraps a client's own line as "<class '...'>:<'line'>", and in a
    simulation Ray's account of the failure lies around it.
    """
    if error.code == ErrorCode.NODE_UNAVAILABLE:
        return "its node is gone, no heartbeat any more"
    text = (error.reason or "no reason given").strip().removesuffix("'>")
    if "ActorDiedError" in text or "ActorUnavailableError" in text:
        return DIED
    for mark in (" occurred. Message:", ":<'"):
        if mark in text:
            text = text.rpartition(mark)[2]
            break
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = lines[0] if lines else "no reason given"
    return "".join(c if c.isprintable() else "?" for c in line[:MAX_REASON])
