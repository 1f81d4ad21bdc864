"""What strategies remember: through a checkpoint and back, or refused before any work."""

import io
import random
import threading
from collections import OrderedDict, deque
from dataclasses import dataclass
from enum import Enum

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import FedAdam, FedAvg

from fedssl.errors import UserError
from fedssl.federation.aggregation import build_strategy
from fedssl.federation.strategy_state import (
    check_savable,
    inner_strategies,
    load_strategy_state_dict,
    strategy_state_dict,
)
from fedssl.runs.checkpoints import Checkpoint, ServerState, load_checkpoint, save_checkpoint


class Mood(Enum):
    CALM = 1
    WILD = 2


@dataclass(frozen=True)
class Budget:
    spent: float
    by_round: dict


class Helper:
    def __init__(self):
        self.count, self.last = 0, None


class Remembering(FedAvg):
    """A strategy of somebody else; what it remembers is given in a test."""

    def __init__(self, **memory):
        super().__init__()
        vars(self).update(memory)


def through_a_checkpoint(strategy, folder):
    state = {"weight": torch.zeros(1)}
    save_checkpoint(folder, Checkpoint(1, state, strategy_state_dict(strategy)), keep=1)
    return load_checkpoint(folder / "round-0001.safetensors").strategy


def restored(folder, memory, fresh):
    """Save a strategy with a memory; load it into one that has another."""
    other = Remembering(thing=fresh)
    saved = through_a_checkpoint(Remembering(thing=memory), folder)
    load_strategy_state_dict(other, saved)
    return other.thing


def same(one, other):
    """Compare values, their types, their dtypes and all that they hold."""
    assert type(one) is type(other)
    if isinstance(one, np.ndarray | np.generic):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, Array):
        same(one.numpy(), other.numpy())
    elif isinstance(one, dict | ArrayRecord | MetricRecord | ConfigRecord):
        assert list(one) == list(other)  # in their order
        assert [type(key) for key in one] == [type(key) for key in other]
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            same(left, right)
    elif hasattr(one, "__dict__"):
        same(vars(one), vars(other))
    else:
        assert one == other or one != one  # NaN, too


VALUES = {
    "nothing": None,
    "true": True,
    "integer": 2**70,
    "float": 0.1 + 0.2,
    "infinite": -float("inf"),
    "not a number": float("nan"),
    "text": "größer",
    "bytes": b"\x00\xff",
    "numpy float": np.float32(0.1),
    "numpy integer": np.int64(-3),
    "numpy truth": np.bool_(True),
    "array": np.arange(6, dtype=np.float64).reshape(2, 3),
    "column order": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
    "array of nothing": np.zeros((0, 3), dtype=np.float32),
    "number in an array": np.array(2.5),
    "half": np.array([0.5, 2], dtype=np.float16),
    "tensor": torch.tensor([[1.5, -2.0]], dtype=torch.float64),
    "truths": torch.tensor([True, False]),
    "list": [1, [2.0, None], "three"],
    "tuple": (1, (np.float64(2), "x")),
    "empty": [[], (), {}],
    "integer keys": {3: "c", 1: "a", 2: [np.zeros(2)]},
    "odd keys": {(0, "a"): 1, None: 2, 1.5: 3, True: 4, np.int32(7): 5},
    "set": {1, 2, "three"},
    "frozen set": frozenset({1, 2}),
    "arrays": ArrayRecord({"z": Array(np.ones(2)), "a": Array(np.float32([[3]]))}),
    "metrics": MetricRecord({"loss": 0.1, "counts": [1, 2]}),
    "config": ConfigRecord({"raw": b"\x01", "names": ["b", "a"], "on": True}),
    "like a kind": {"array": "0", "object": "Helper"},
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_comes_back_as_it_was(tmp_path, name):
    same(restored(tmp_path, VALUES[name], fresh="another"), VALUES[name])


@pytest.mark.parametrize("fresh", [np.random.default_rng(1), None])
def test_a_generator_of_numpy_goes_on_where_it_was(tmp_path, fresh):
    generator = np.random.default_rng(7)
    generator.random(5)
    found = restored(tmp_path, generator, fresh)
    assert found.random(4).tolist() == generator.random(4).tolist()


def test_another_bit_generator_stays_one(tmp_path):
    generator = np.random.Generator(np.random.MT19937(3))
    generator.normal(size=3)
    found = restored(tmp_path, generator, None)
    assert found.normal(size=700).tolist() == generator.normal(size=700).tolist()


def test_a_generator_of_python_goes_on_where_it_was(tmp_path):
    generator = random.Random(7)
    generator.gauss(0, 1)  # of which it keeps a second one
    found = restored(tmp_path, generator, random.Random())
    assert [found.gauss(0, 1) for _ in range(4)] == [generator.gauss(0, 1) for _ in range(4)]


def test_objects_are_loaded_in_place_with_all_that_they_hold(tmp_path):
    helper = Helper()
    helper.count, helper.last, helper.new = 3, {1: np.ones(2)}, "of the first round"
    fresh = Helper()
    found = restored(tmp_path, helper, fresh)
    assert found is fresh
    same(found, helper)


def test_frozen_objects_and_enums_are_loaded_too(tmp_path):
    memory, fresh = Budget(2.5, {1: 0.5}), Budget(0.0, {})
    same(restored(tmp_path, memory, fresh), memory)
    assert restored(tmp_path, Mood.WILD, Mood.CALM) is Mood.WILD


def test_an_attribute_that_is_gone_is_taken_away(tmp_path):
    state = through_a_checkpoint(Remembering(), tmp_path)
    strategy = Remembering(thing=1)
    load_strategy_state_dict(strategy, state)
    assert not hasattr(strategy, "thing")


def test_functions_are_those_of_the_constructor(tmp_path):
    mean = Remembering(reduce=np.mean, choose=max, own=lambda: 1, floor=np.floor)
    median = Remembering(reduce=np.median, choose=min, own=lambda: 2, floor=np.ceil)
    load_strategy_state_dict(median, through_a_checkpoint(mean, tmp_path))
    assert (median.reduce, median.choose, median.floor) == (np.median, min, np.ceil)
    assert median.own() == 2


def test_an_inner_strategy_is_restored_within_its_wrapper(tmp_path):
    inner = FedAdam()
    inner.m_t = {"a": np.ones(2)}
    fresh = Remembering(strategy=FedAdam())
    wrapper = Remembering(strategy=inner, norm=0.25)
    load_strategy_state_dict(fresh, through_a_checkpoint(wrapper, tmp_path))
    assert list(map(type, inner_strategies(fresh))) == [Remembering, FedAdam]
    same(fresh.strategy, inner)
    assert fresh.norm == 0.25


def test_what_is_restored_shares_nothing_with_what_was_saved():
    moments = np.zeros(3)
    state = strategy_state_dict(Remembering(moments=moments))
    moments += 1
    other = Remembering()
    load_strategy_state_dict(other, state)
    other.moments += 5
    assert all(not array.any() for array in state.arrays.values())


def test_the_state_of_another_strategy_is_refused():
    state = strategy_state_dict(FedAdam())
    with pytest.raises(ValueError, match="the state of a FedAdam, not of a FedAvg"):
        load_strategy_state_dict(FedAvg(), state)


def test_an_object_that_the_constructor_does_not_make_is_refused_on_loading():
    state = strategy_state_dict(Remembering(thing=Helper()))
    for fresh in (Remembering(), Remembering(thing=None)):
        with pytest.raises(ValueError, match="the state of a Helper, not of a NoneType"):
            load_strategy_state_dict(fresh, state)


def test_a_state_of_an_older_version_is_told_from_no_state():
    load_strategy_state_dict(FedAvg(), ServerState())
    with pytest.raises(ValueError, match="older version"):
        load_strategy_state_dict(FedAvg(), ServerState(None, {"m_t": np.ones(1)}))


class ItsOwn(dict):
    pass


def knot():
    helper = Helper()
    helper.last = helper
    return helper


UNSAVABLE = {
    "lock": (threading.Lock, "Remembering.thing holds a lock"),
    "event": (threading.Event, r"Remembering.thing._cond"),
    "file": (lambda: open(__file__), "Remembering.thing holds a TextIOWrapper"),  # noqa: SIM115
    "buffer": (io.BytesIO, "Remembering.thing holds a BytesIO"),
    "object in a list": (lambda: [1, Helper()], r"Remembering.thing\[1\] holds a Helper"),
    "object in a dict": (lambda: {"a": {2: Helper()}}, r"thing\['a'\]\[2\] holds a Helper"),
    "function in a list": (lambda: [max], r"thing\[0\] holds a builtin_function_or_method"),
    "iterator": (lambda: iter([1]), "holds a list_iterator"),
    "ordered dict": (lambda: OrderedDict(a=1), "holds a OrderedDict"),
    "dict of its own": (ItsOwn, "holds a ItsOwn"),
    "queue": (deque, "holds a deque"),
    "objects": (lambda: np.array([None]), "array of object"),
    "complex": (lambda: np.zeros(2, dtype=complex), "array of complex128"),
    "masked": (lambda: np.ma.masked_array([1, 2], [0, 1]), "holds a MaskedArray"),
    "parameter": (lambda: torch.nn.Parameter(torch.ones(1)), "holds a Parameter"),
    "network": (lambda: torch.nn.Linear(2, 2), r"Remembering.thing\._parameters"),
    "knot": (knot, "Remembering holds an object that holds itself"),
}


@pytest.mark.parametrize("name", UNSAVABLE)
def test_what_cannot_be_saved_is_refused_in_one_line(name):
    make, reason = UNSAVABLE[name]
    thing = make()
    with pytest.raises(UserError, match=reason) as error:
        check_savable(Remembering(thing=thing))
    assert str(error.value).startswith("strategy: Remembering")
    assert "could not be resumed" in str(error.value)
    assert "\n" not in str(error.value)
    if name == "file":
        thing.close()


class Locked(FedAvg):
    """Made by its `_target_`."""

    def __init__(self):
        super().__init__()
        self.guard = threading.Lock()


def test_a_strategy_of_the_configuration_is_checked_when_it_is_built(monkeypatch):
    monkeypatch.setattr("flwr.serverapp.strategy.Locked", Locked, raising=False)
    target = "flwr.serverapp.strategy"
    inner = {"_target_": f"{target}.Locked"}
    with pytest.raises(UserError, match=r"strategy: Locked\.guard holds a lock"):
        build_strategy(inner)
    wrapper = f"{target}.DifferentialPrivacyServerSideFixedClipping"
    spec = {"noise_multiplier": 1, "clipping_norm": 1, "num_sampled_clients": 2}
    with pytest.raises(UserError, match=r"Clipping\.strategy\.guard holds a lock"):
        build_strategy({"_target_": wrapper, "strategy": inner, **spec})
