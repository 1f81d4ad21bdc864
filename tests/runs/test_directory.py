import json

import pytest
import torch
from conftest import create_run

from fedssl.errors import UserError
from fedssl.files import check_writable, write_atomically
from fedssl.runs.directory import RunDirectory
from fedssl.runs.metrics import RoundMetrics
from fedssl.runs.provenance import provenance


@pytest.fixture
def run(tmp_path, config):
    return create_run(tmp_path / "day" / "one", config)


def test_a_run_without_checkpoints_says_so(run):
    with pytest.raises(UserError, match="no checkpoint"):
        run.last_checkpoint()


def test_a_folder_that_is_no_run_says_so(tmp_path):
    with pytest.raises(UserError, match=r"no config\.yaml"):
        RunDirectory(tmp_path).load_config()


def test_latest_points_at_the_newest_run(tmp_path, config):
    for name in ("one", "two"):
        run = create_run(tmp_path / "day" / name, config)
        assert (tmp_path / "latest").resolve() == run.path
    assert not (tmp_path / "latest").readlink().is_absolute()  # the folder can be moved


def test_results_are_kept_side_by_side(run):
    run.add_result({"rows": [1]})
    run.add_result({"rows": [2]})
    assert json.loads(run.results.read_text()) == [{"rows": [1]}, {"rows": [2]}]


def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "file"
    write_atomically(file, b"old")
    monkeypatch.setattr("fedssl.files.os.fsync", lambda descriptor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_atomically(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_runs_of_the_same_second_get_directories_of_their_own(tmp_path, config):
    runs = [create_run(tmp_path / "12-00-00", config) for _ in range(3)]
    assert [run.path.name for run in runs] == ["12-00-00", "12-00-00-2", "12-00-00-3"]
    assert all(run.config.is_file() for run in runs)


def test_a_damaged_metrics_line_is_named(run):
    run.append_metrics(RoundMetrics(1))
    run.append_metrics(RoundMetrics(2))
    run.metrics.write_bytes(run.metrics.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is damaged .*take the line out"):
        run.read_metrics()


def test_a_metrics_line_of_something_else_is_named(run):
    run.append_metrics(RoundMetrics(1))
    with run.metrics.open("a") as file:
        file.write("[1]\n")
    with pytest.raises(UserError, match=r"line 2 is no round of a run; take the line out"):
        run.read_metrics()


def test_metrics_are_kept_one_a_round(run):
    assert run.read_metrics() == []
    rounds = [RoundMetrics(1, knn=0.1 + 0.2), RoundMetrics(2, warnings=("collapsed",))]
    for metrics in rounds:
        run.append_metrics(metrics)
    assert run.read_metrics() == rounds
    assert len(run.metrics.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [("[{", "double quotes"), ("5", "no list"), ('[{"rows": []}, {"a": 1}]', "entry 2 is no")],
)
def test_damaged_results_are_named(run, text, reason):
    run.add_result({"rows": []})
    run.results.write_text(text)
    with pytest.raises(UserError, match=rf"results\.json: damaged .*{reason}"):
        run.add_result({"rows": []})


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
