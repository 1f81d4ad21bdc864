import json

import numpy as np
import pytest
import torch

from fedssl.errors import UserError
from fedssl.runs.checkpoints import (
    Checkpoint,
    ServerState,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from fedssl.runs.metrics import ClientMetrics, RoundMetrics

METRICS = RoundMetrics(12, train_loss=0.1 + 0.2, clients=(ClientMetrics(0, update_norm=0.1),))


@pytest.fixture
def state():
    return {"weight": torch.randn(3, 4), "count": torch.tensor(7)}


@pytest.fixture
def memory():
    return {"m_t|dict|00000|weight": np.arange(6.0).reshape(2, 3), "n|list|00000|": np.float32(2)}


def test_a_checkpoint_comes_back_whole(tmp_path, state, memory):
    saved = Checkpoint(12, state, ServerState([1, None], memory), METRICS, "digest")
    save_checkpoint(tmp_path, saved, keep=1)
    (file,) = list_checkpoints(tmp_path)
    loaded = load_checkpoint(file)
    assert (loaded.round, loaded.metrics, loaded.images) == (12, METRICS, "digest")
    assert loaded.state.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded.state[name].dtype == tensor.dtype
        assert torch.equal(loaded.state[name], tensor)
    for name, array in memory.items():
        assert loaded.strategy.arrays[name].dtype == array.dtype
        assert np.array_equal(loaded.strategy.arrays[name], array)


def test_the_last_few_checkpoints_stay(tmp_path, state, memory):
    for number in range(1, 13):
        save_checkpoint(tmp_path, Checkpoint(number, state, ServerState([], memory)), keep=3)
    names = sorted(file.name for file in tmp_path.iterdir())
    expected = [f"round-{n:04d}.{e}" for n in (10, 11, 12) for e in ("json", "safetensors")]
    assert names == expected + [f"server-{n:04d}.safetensors" for n in (10, 11, 12)]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "no such file"),
        ("truncated", "truncated or damaged"),
        ("no json", "json is missing"),
        ("bad json", "json is damaged"),
        ("no server", "can't be read"),
    ],
)
def test_a_damaged_checkpoint_gets_one_line(tmp_path, state, memory, damage, message):
    save_checkpoint(tmp_path, Checkpoint(1, state, ServerState([], memory)), keep=1)
    file = tmp_path / "round-0001.safetensors"
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-9])
    elif damage == "no json":
        file.with_suffix(".json").unlink()
    elif damage == "no server":
        (tmp_path / "server-0001.safetensors").unlink()
    else:
        file.with_suffix(".json").write_text("{")
    with pytest.raises(UserError, match=message) as error:
        load_checkpoint(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["round-0001.safetensors", "server-0001.safetensors"])
def test_every_flipped_bit_is_noticed(tmp_path, state, memory, name):
    save_checkpoint(
        tmp_path, Checkpoint(1, state, ServerState([], memory), RoundMetrics(1)), keep=1
    )
    flip_each_byte(tmp_path / name, tmp_path / "round-0001.safetensors")


def test_every_flipped_bit_of_the_json_is_noticed(tmp_path, state):
    save_checkpoint(tmp_path, Checkpoint(1, state, metrics=RoundMetrics(1, 2.5)), keep=1)
    flip_each_byte(tmp_path / "round-0001.json", tmp_path / "round-0001.safetensors")


def flip_each_byte(file, checkpoint):
    whole = file.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        if file.suffix == ".json" and same_json(damaged, whole):
            continue  # a blank for a blank
        file.write_bytes(damaged)
        with pytest.raises(UserError):
            load_checkpoint(checkpoint)
    file.write_bytes(whole)
    load_checkpoint(checkpoint)


def same_json(one, other):
    try:
        return json.dumps(json.loads(one)) == json.dumps(json.loads(other))
    except ValueError:
        return False
