"""What a strategy remembers from round to round: taken out of it, and given back exactly.

A strategy keeps its state in its attributes: server optimizers their moments, adaptive
clipping its norm, a wrapper its inner strategy. All of it becomes JSON and arrays, with
the types of numbers and of keys, so that a resumed run goes on with the same bytes.
"""

import copyreg
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import partial
from random import Random
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import Strategy

from fedssl.errors import UserError
from fedssl.runs.checkpoints import ServerState

ARRAYS: dict[str, type] = {"array": np.ndarray, "scalar": np.generic, "tensor": torch.Tensor}
RECORDS: dict[str, type] = {"arrays": ArrayRecord, "metrics": MetricRecord, "config": ConfigRecord}
SEQUENCES: dict[str, type] = {each.__name__: each for each in (list, tuple, set, frozenset)}
NUMPY_CODE = (np.ufunc, type(np.mean))
CODE = (FunctionType, BuiltinFunctionType, MethodType, ModuleType, partial, type, *NUMPY_CODE)


def strategy_state_dict(strategy: Strategy) -> ServerState:
    """Collect what a strategy keeps in its attributes, but for functions.

    Raises:
        TypeError: an attribute, which is named, can't be saved.
    """
    arrays: dict[str, np.ndarray] = {}
    name = type(strategy).__name__
    try:
        return ServerState(_encode_object(strategy, name, arrays), arrays)
    except RecursionError as error:
        raise TypeError(f"{name} holds an object that holds itself") from error


def load_strategy_state_dict(strategy: Strategy, state: ServerState) -> None:
    """Give a strategy back what `strategy_state_dict` collected from another of its kind.

    Raises:
        ValueError: the state is that of another kind, or of an older version.
    """
    if state.tree is not None:
        _load_object(strategy, state.tree, state.arrays)
    elif state.arrays:
        raise ValueError("the state of the strategy was written by an older version")


def check_savable(strategy: Strategy) -> None:
    """Make sure, before any work, that a run with this strategy can be resumed.

    Raises:
        UserError: an attribute can't be saved.
    """
    try:
        strategy_state_dict(strategy)
    except TypeError as error:
        raise UserError(
            f"strategy: {error}, so the run could not be resumed; keep arrays, numbers, texts, "
            "lists and dictionaries of them, or an inner strategy"
        ) from error


def inner_strategies(strategy: Strategy) -> Iterator[Strategy]:
    """List a strategy and those that it wraps, from the outside."""
    yield strategy
    for value in vars(strategy).values():
        if isinstance(value, Strategy):
            yield from inner_strategies(value)


def _encode_object(thing: object, path: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Encode the attributes of an object, but for code, which its constructor gives again."""
    kept = {
        name: _encode(value, f"{path}.{name}", arrays, whole=True)
        for name, value in vars(thing).items()
        if not isinstance(value, CODE)
    }
    return {"object": type(thing).__qualname__, "kept": kept}


def _encode(value: Any, path: str, arrays: dict[str, np.ndarray], whole: bool = False) -> Any:
    """Turn a value into JSON; numbers and texts stay, all else is an object with its kind.

    Args:
        whole: the value is an attribute, so that an object can be loaded in place.

    Raises:
        TypeError: what can't be saved, by its path.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (np.ndarray, torch.Tensor) or isinstance(value, np.generic):
        return _encode_array(value, path, arrays)
    if type(value) is bytes:
        return {"bytes": value.hex()}
    if type(value) in RECORDS.values():
        kind = next(kind for kind, record in RECORDS.items() if type(value) is record)
        items = [[k, v.numpy() if isinstance(v, Array) else v] for k, v in value.items()]
        return {kind: [[k, _encode(v, f"{path}[{k!r}]", arrays)] for k, v in items]}
    if type(value) in SEQUENCES.values():
        kind = type(value).__name__
        return {kind: [_encode(v, f"{path}[{n}]", arrays) for n, v in enumerate(value)]}
    if type(value) is dict:
        items = [
            [_encode(k, path, arrays), _encode(v, f"{path}[{k!r}]", arrays)]
            for k, v in value.items()
        ]
        return {"dict": items}
    if type(value) is np.random.Generator:
        return {"generator": _encode(value.bit_generator.state, path, arrays)}
    if type(value) is Random:
        return {"random": _encode(value.getstate(), path, arrays)}
    if whole and isinstance(value, Enum):
        return {"enum": value.name}
    if whole and _keeps_state(value):
        return {"state": _encode(value.state_dict(), f"{path}.state_dict()", arrays)}
    if whole and _is_its_attributes(value):
        return _encode_object(value, path, arrays)
    raise TypeError(f"{path} holds a {type(value).__name__}, which can't be saved")


def _keeps_state(thing: object) -> bool:
    """Tell whether an object gives its state as a dictionary, as Flower's accountants do."""
    ways = (getattr(thing, name, None) for name in ("state_dict", "load_state_dict"))
    return all(map(callable, ways)) and type(thing.state_dict()) is dict  # type: ignore[attr-defined]


def _is_its_attributes(thing: object) -> bool:
    """Tell whether attributes are all that makes an object, unlike a file or an OrderedDict."""
    try:
        reduced = thing.__reduce_ex__(2)
    except TypeError:  # how files and locks refuse to be pickled
        return False
    if not isinstance(reduced, tuple) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
        return False
    _, made_from, state, *items = reduced
    plain = len(made_from) == 1 and isinstance(state, dict | None)
    return plain and all(item is None for item in items)


def _encode_array(value: Any, path: str, arrays: dict[str, np.ndarray]) -> dict[str, str]:
    kind = next(kind for kind, its in ARRAYS.items() if isinstance(value, its))
    array = value.detach().cpu().numpy() if kind == "tensor" else np.asarray(value)
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise TypeError(f"{path} holds an array of {array.dtype}, which can't be saved")
    number = str(len(arrays))
    arrays[number] = np.array(array, order="C")
    return {kind: number}


def _load_object(thing: object, node: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Set the attributes of an object to what was kept of another of its kind."""
    if node.get("object") != type(thing).__qualname__:
        raise ValueError(
            f"the state of a {node.get('object')}, not of a {type(thing).__qualname__}"
        )
    own = vars(thing)  # written to directly, as that of a frozen dataclass
    for name in [n for n, v in own.items() if n not in node["kept"] and not isinstance(v, CODE)]:
        del own[name]
    for name, value in node["kept"].items():
        if isinstance(value, dict) and "object" in value:
            _load_object(own.get(name), value, arrays)
        elif isinstance(value, dict) and "state" in value:
            own[name].load_state_dict(_decode(value["state"], arrays))
        elif isinstance(value, dict) and "enum" in value:
            own[name] = type(own[name])[value["enum"]]
        else:
            own[name] = _decode(value, arrays)


def _decode(node: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """Turn JSON back into a value."""
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "array":
        return arrays[content].copy()
    if kind == "scalar":
        return arrays[content][()]
    if kind == "tensor":
        return torch.from_numpy(arrays[content].copy())
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind in RECORDS:
        items = {k: _decode(v, arrays) for k, v in content}
        if kind == "arrays":
            return ArrayRecord({k: Array(v) for k, v in items.items()})
        return RECORDS[kind](items)
    if kind in SEQUENCES:
        return SEQUENCES[kind](_decode(v, arrays) for v in content)
    if kind == "dict":
        return {_decode(k, arrays): _decode(v, arrays) for k, v in content}
    state = _decode(content, arrays)
    if kind == "generator":
        bit_generator = getattr(np.random, state["bit_generator"])()
        bit_generator.state = state
        return np.random.Generator(bit_generator)
    if kind == "random":
        random = Random()
        random.setstate(state)
        return random
    raise ValueError(f"a value of the unknown kind {kind!r}")
