import json

import pytest
import torch

from errors import UserError
from rundir import RunDirectory, check_writable, load_checkpoint, provenance, write_atomically


@pytest.fixture
def run(tmp_path, config):
    return RunDirectory.create(tmp_path / "day" / "one", config)


@pytest.fixture
def state():
    return {"weight": torch.randn(3, 4), "count": torch.tensor(7)}


def test_a_checkpoint_comes_back_with_its_bytes_and_round(run, state):
    run.save_checkpoint(12, state, keep=1)
    loaded, round_number = load_checkpoint(run.last_checkpoint())
    assert round_number == 12
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_the_last_few_checkpoints_stay(run, state):
    for number in range(1, 13):
        run.save_checkpoint(number, state, keep=3)
    names = sorted(file.name for file in run.checkpoints.iterdir())
    assert names == [
        f"round-{number:04d}.{ending}"
        for number in (10, 11, 12)
        for ending in ("json", "safetensors")
    ]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "no such file"),
        ("truncated", "truncated or damaged"),
        ("flipped", "truncated or damaged"),
        ("no json", "json is missing"),
        ("bad json", "not a checkpoint"),
    ],
)
def test_a_damaged_checkpoint_gets_one_line(run, state, damage, message):
    run.save_checkpoint(1, state, keep=1)
    file = run.last_checkpoint()
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[-3] ^= 1
        file.write_bytes(data)
    elif damage == "no json":
        file.with_suffix(".json").unlink()
    else:
        file.with_suffix(".json").write_text("{")
    with pytest.raises(UserError, match=message) as error:
        load_checkpoint(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_without_checkpoints_says_so(run):
    with pytest.raises(UserError, match="no checkpoint"):
        run.last_checkpoint()


def test_a_folder_that_is_no_run_says_so(tmp_path):
    with pytest.raises(UserError, match=r"no config\.yaml"):
        RunDirectory(tmp_path).load_config()


def test_latest_points_at_the_newest_run(tmp_path, config):
    for name in ("one", "two"):
        run = RunDirectory.create(tmp_path / "day" / name, config)
        assert (tmp_path / "latest").resolve() == run.path
    assert not (tmp_path / "latest").readlink().is_absolute()  # the folder can be moved


def test_results_are_kept_side_by_side(run):
    run.add_result({"a": 1})
    run.add_result({"b": 2})
    assert json.loads(run.results.read_text()) == [{"a": 1}, {"b": 2}]


def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "file"
    write_atomically(file, b"old")
    monkeypatch.setattr("rundir.os.fsync", lambda descriptor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_atomically(file, b"new")
    assert file.read_bytes() == b"old"


def test_an_output_directory_that_cannot_be_made_gets_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output_dir=.*can't be written"):
        check_writable(tmp_path / "file" / "below")
    check_writable(tmp_path / "a" / "b")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_number_tells_where_it_was_measured():
    facts = provenance()
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0]
    assert facts["hardware"]["cores"] >= 1
