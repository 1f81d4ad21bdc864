"""Whatever comes in: one line or a sound result, never a traceback, never a wrong result.

The cases are drawn by hypothesis from a fixed seed; `--hypothesis-seed` draws others.
"""

import math
import os

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st

from fedssl.config.compose import flatten, load_config
from fedssl.data.decoding import decode
from fedssl.errors import UserError
from fedssl.federation.guards import read_update, reject_outliers
from fedssl.federation.messages import pack_arrays, split_state, unpack_arrays, write_state
from fedssl.runs.checkpoints import Checkpoint, ServerState, load_checkpoint, save_checkpoint
from fedssl.runs.metrics import RoundMetrics

TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
CASES = settings(
    max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
# Composing a configuration takes a tenth of a second; FUZZ_CONFIGURATIONS=1000 tries them all.
CONFIGURATIONS = settings(CASES, max_examples=int(os.environ.get("FUZZ_CONFIGURATIONS", "60")))
KEYS = sorted(flatten(load_config("config", [])))
STATE = {"a": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3)}
MEMORY = {"0": np.arange(6.0)}
METRICS = RoundMetrics(1, train_loss=0.5)

texts = st.text(max_size=12)
numbers = st.one_of(st.integers(), st.floats(), st.sampled_from([0, -1, 1e308, -1e-308, 2**63]))
values = st.one_of(numbers.map(str), texts, st.sampled_from(["null", "[]", "{}", "[1,2]", "''"]))
keys = st.one_of(st.sampled_from(KEYS), texts)


def sound(config):
    """Tell whether a configuration that was accepted holds what its checks promise."""
    return config.num_clients >= 1 and config.num_rounds >= 1 and config.round_timeout_s > 0


@seed(0)
@CONFIGURATIONS
@given(st.lists(st.tuples(keys, values), max_size=3))
@example([("num_clients", "nan")])
@example([("train.learning_rate", "nan")])
@example([("train.learning_rate", "inf")])
@example([("", "")])
@pytest.mark.slow
def test_any_configuration_is_refused_in_a_line_or_sound(pairs):
    refusal = ""
    try:
        config = load_config("config", [f"{key}={value}" for key, value in pairs])
    except UserError as error:
        refusal = str(error)
    if refusal:
        assert "\n" not in refusal
        return
    assert sound(config)
    for key, value in flatten(config).items():
        assert not (isinstance(value, float) and not math.isfinite(value)), key


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder, Checkpoint(1, STATE, ServerState(["x"], MEMORY), METRICS), keep=1)
    return {file: file.read_bytes() for file in sorted(folder.iterdir())}


@st.composite
def damages(draw):
    """Draw a change of a file: bytes replaced, cut out, put in, or all of it new."""
    kind = draw(st.sampled_from(["replace", "cut", "insert", "all"]))
    return kind, draw(st.floats(0, 1)), draw(st.binary(max_size=16))


def damage(data, change):
    kind, where, piece = change
    if kind == "all":
        return piece
    place = int(where * len(data))
    behind = place + len(piece) * (kind != "insert")
    return data[:place] + piece * (kind != "cut") + data[behind:]


@seed(1)
@CASES
@given(which=st.integers(0, 2), change=damages())
def test_any_damage_to_a_checkpoint_is_refused_or_harmless(saved, which, change):
    files = list(saved)
    for file, data in saved.items():
        file.write_bytes(damage(data, change) if file == files[which] else data)
    model = next(file for file in files if file.name == "round-0001.safetensors")
    refusal = ""
    try:
        loaded = load_checkpoint(model)
    except UserError as error:
        refusal = str(error)
    if refusal:
        assert "\n" not in refusal
        return
    assert loaded.round == 1
    assert loaded.metrics == METRICS
    assert torch.equal(loaded.state["a"], STATE["a"])
    assert np.array_equal(loaded.strategy.arrays["0"], MEMORY["0"])


dtypes = st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bfloat16, torch.bool])
shapes = st.lists(st.integers(0, 3), max_size=3)
floats = st.floats(width=32)


@st.composite
def states(draw):
    """Draw weights that are nearly those of the model, or not at all."""
    state = {"a": torch.tensor(draw(st.lists(floats, min_size=6, max_size=6))).reshape(2, 3)}
    state["n"] = torch.tensor(draw(st.integers(-(2**62), 2**62)))
    for name in draw(st.lists(st.sampled_from(["a", "n", "b", ""]), max_size=2)):
        if draw(st.booleans()):
            state.pop(name, None)
        else:
            state[name] = torch.zeros(draw(shapes)).to(draw(dtypes))
    return state


metrics = st.dictionaries(
    st.sampled_from(["num-examples", "train-loss", "images", "images-per-second", "x"]),
    st.one_of(st.integers(-(2**62), 2**62), st.floats(), st.lists(st.integers(0, 9), min_size=1)),
)


@seed(2)
@CASES
@given(state=states(), given_metrics=metrics, complete=st.booleans(), change=damages())
@pytest.mark.slow
def test_any_update_is_refused_or_sound(state, given_metrics, complete, change):
    whole = {"num-examples": 5, "train-loss": 1.0, "images": 5, "images-per-second": 2.0}
    names = [name for name, value in state.items() if value.dtype in (torch.float32, torch.float64)]
    packed = pack_arrays(split_state(state, names)[0])
    if not complete:
        data = damage(packed["safetensors"].data, change)
        packed = ArrayRecord({"safetensors": Array("uint8", (len(data),), "safetensors", data)})
    content = write_state(state, names)
    try:
        content["arrays"] = unpack_arrays(packed)
    except ValueError:
        return
    content["metrics"] = MetricRecord({**(whole if complete else {}), **given_metrics})
    try:
        update = read_update(1, Message(content, 1, "train"), STATE)
    except ValueError:
        return
    assert update.num_examples >= 1
    assert {k: (v.shape, v.dtype) for k, v in update.state.items()} == {
        k: (v.shape, v.dtype) for k, v in STATE.items()
    }
    assert torch.isfinite(update.state["a"]).all()
    kept, failures = reject_outliers([update], STATE, ["a"], 10)
    assert len(kept) + len(failures) == 1
    assert all(math.isfinite(u.update_norm) for u in kept)


@seed(3)
@CASES
@given(st.binary(max_size=200), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM"]))
def test_any_bytes_are_an_image_or_none(data, magic):
    pixels = decode(magic + data, 8)
    assert pixels is None or (pixels.shape, pixels.dtype) == ((3, 8, 8), np.uint8)
