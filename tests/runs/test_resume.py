"""Going on with a run: what may differ, what is refused, what a killed run leaves."""

import json
import os
import signal
import time

import pytest
import torch
from conftest import create_run

import main as program
from benchmarks.robustness import kills
from fedssl.config.compose import load_config
from fedssl.errors import UserError
from fedssl.federation.resources import ClientResources
from fedssl.runs.checkpoints import Checkpoint, save_checkpoint
from fedssl.runs.directory import RunDirectory
from fedssl.runs.metrics import RoundMetrics
from fedssl.runs.resume import check_continuation, check_same, reopen, with_earlier_overrides
from utils import continuation_of

ROUNDS = [RoundMetrics(number, train_loss=1 / number) for number in (1, 2, 3)]
STATE = {"weight": torch.ones(3)}


@pytest.fixture
def compose(tmp_path, cache_dir):
    def build(*overrides):
        places = [f"output_dir={tmp_path}", f"cache_dir={cache_dir}"]
        return load_config("config", [*places, *overrides])

    return build


@pytest.fixture
def stopped(tmp_path, compose):
    """A run of seven rounds that ended after three."""
    run = create_run(tmp_path / "run", compose(), ["model.stem=imagenet", "seed=0"])
    for metrics in ROUNDS:
        save_checkpoint(run.checkpoints, Checkpoint(metrics.round, STATE, metrics=metrics), keep=3)
        run.append_metrics(metrics)
    run._lock.close()
    return run


def go_on(compose, *overrides):
    said = []
    run, checkpoint = reopen(
        continuation_of(compose("resume=latest", *overrides), None), [], said.append
    )
    run._lock.close()
    return checkpoint, run.read_metrics(), said


def test_a_run_goes_on_after_its_last_round(stopped, compose):
    checkpoint, rounds, said = go_on(compose)
    assert checkpoint.round == 3
    assert rounds == ROUNDS
    assert said == [f"going on with {stopped.path} after round 3"]


def test_a_metrics_line_that_was_not_written_any_more_comes_from_the_checkpoint(stopped, compose):
    stopped.write_metrics(ROUNDS[:2])
    assert go_on(compose)[1] == ROUNDS


@pytest.mark.parametrize("damage", ["unfinished", "flipped", "partial"])
def test_a_round_that_was_being_written_is_repeated_and_named(stopped, compose, damage):
    newest = stopped.checkpoints / "round-0003.safetensors"
    if damage == "unfinished":
        newest.with_suffix(".json").unlink()
    elif damage == "flipped":
        data = bytearray(newest.read_bytes())
        data[-1] ^= 1
        newest.write_bytes(data)
    else:
        newest.unlink()
        newest.with_suffix(".json").unlink()
        (stopped.checkpoints / ".partial-0123abcd-round-0003.safetensors").write_bytes(b"half")
    checkpoint, rounds, said = go_on(compose)
    assert checkpoint.round == 2
    assert rounds == ROUNDS[:2]
    assert "round-0003" in said[0]
    assert said[-1].endswith("after round 2")
    assert all("0003" not in file.name for file in stopped.checkpoints.iterdir())


def test_what_rounding_has_left_is_put_back_too(stopped, compose):
    left = stopped.clients / "partition-0" / "left"
    left.mkdir(parents=True)
    for name in ("round-0003", "round-0004", ".partial-0123abcd-round-0004"):
        (left / f"{name}.safetensors").write_bytes(b"")
    go_on(compose)
    assert [file.name for file in left.iterdir()] == ["round-0003.safetensors"]


def test_all_checkpoints_damaged_is_an_error(stopped, compose):
    for file in stopped.checkpoints.glob("*.json"):
        file.write_text("{}")
    with pytest.raises(UserError, match="all 3 checkpoints are damaged"):
        go_on(compose)


def test_a_run_that_ended_before_its_first_round_starts_again(tmp_path, compose):
    create_run(tmp_path / "run", compose())._lock.close()
    checkpoint, rounds, said = go_on(compose)
    assert (checkpoint, rounds) == (None, [])
    assert "no round was finished" in said[-1]


HARMLESS = ["num_rounds=9", "num_cpus=2", "precision=float32", "min_results=2", "eval.epochs=3"]


@pytest.mark.parametrize("change", HARMLESS)
def test_harmless_changes_are_allowed(stopped, compose, change):
    assert go_on(compose, change)[0].round == 3


@pytest.mark.parametrize(
    "change", ["seed=1", "model=resnet50", "optimizer.learning_rate=0.01", "num_clients=4"]
)
def test_changes_that_make_it_another_run_are_refused_by_key(stopped, compose, change):
    with pytest.raises(UserError, match="started differently") as error:
        go_on(compose, change)
    key = "model.encoder" if "resnet" in change else change.partition("=")[0]
    assert f"{key} was " in str(error.value)
    assert "\n" not in str(error.value)


def test_fewer_rounds_than_are_done_are_refused(stopped, compose):
    with pytest.raises(UserError, match="num_rounds=2: the run has done 3"):
        go_on(compose, "num_rounds=2")


def test_a_run_that_is_done_and_evaluated_is_left_alone(stopped, compose):
    stopped.add_result({"rows": [], "round": 3})
    with pytest.raises(UserError, match="all 3 rounds are done and evaluated"):
        go_on(compose, "num_rounds=3")


def test_a_run_whose_evaluation_is_of_an_earlier_round_is_evaluated(stopped, compose):
    stopped.add_result({"rows": [], "round": 2})
    assert go_on(compose, "num_rounds=3")[0].round == 3


def test_a_last_round_without_an_evaluation_is_no_end(stopped, compose):
    row = RoundMetrics(4, train_loss=1.0)
    save_checkpoint(stopped.checkpoints, Checkpoint(4, STATE, metrics=row), keep=3)
    with pytest.raises(UserError, match=r"num_rounds=4: .*evaluate_every=3.* give at least 5"):
        go_on(compose, "num_rounds=4", "evaluate_every=3")
    assert go_on(compose, "num_rounds=5", "evaluate_every=3")[0].round == 4


def test_other_images_are_refused(stopped, compose):
    save_checkpoint(stopped.checkpoints, Checkpoint(4, STATE, images="others"), keep=3)
    with pytest.raises(UserError, match="the images differ"):
        check_continuation(continuation_of(compose("resume=latest"), None))


def test_a_run_that_is_still_going_on_is_refused(stopped, compose):
    busy = RunDirectory(stopped.path)
    busy.lock()
    with pytest.raises(UserError, match="still going on in another process"):
        go_on(compose)
    busy._lock.close()


def test_the_overrides_of_the_start_come_back(stopped, tmp_path):
    given = [f"output_dir={tmp_path}", "resume=latest", "seed=3"]
    complete = with_earlier_overrides(given)
    assert complete == ["model.stem=imagenet", *given, f"run_dir='{stopped.path}'"]
    assert with_earlier_overrides(["seed=3"]) == ["seed=3"]
    assert load_config("config", complete).run_dir == str(stopped.path)


def test_a_runs_path_may_hold_an_apostrophe(stopped, tmp_path):
    odd = tmp_path / "Ann's work"
    odd.mkdir()
    stopped.path.rename(odd / "run")
    complete = with_earlier_overrides([f"resume='{odd}/run'".replace("n's", "n\\'s")])
    assert load_config("config", complete).run_dir == str(odd / "run")


def test_a_missing_run_is_named(tmp_path):
    with pytest.raises(UserError, match=r"resume=latest: no run at"):
        with_earlier_overrides(["resume=latest", f"output_dir={tmp_path}"])


def test_differences_are_listed_by_key():
    with pytest.raises(UserError, match=r"seed was 0, is 1; train\.momentum was None, is 0\.9"):
        check_same({"seed": 1, "train.momentum": 0.9, "num_rounds": 3}, {"seed": 0})


@pytest.mark.slow
def test_neither_the_order_nor_the_number_at_a_time_changes_a_byte(tmp_path, compose, digits):
    """Five clients, one after the other and all at once on two cores."""
    ends = []
    for at_a_time in (1, 5):
        config = compose(*kills.RUN, "num_clients=5", "num_rounds=1")
        run = create_run(tmp_path / f"{at_a_time}", config)
        program.train(config, ClientResources(1, 0, 0, at_a_time), digits, run)
        last = run.last_checkpoint().read_bytes()
        lines = [metrics.to_json() for metrics in run.read_metrics()]
        ends.append((last, kills.without_durations(lines)))
    assert ends[0] == ends[1]


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    """The short version of benchmarks/kills.py; clients share a process and keep a target."""
    keeping = ["num_cpus=2", "method=byol", "receive=fedema"]
    monkeypatch.setattr(kills, "RUN", [*kills.RUN, *keeping, "num_rounds=2"])
    result = kills.run_trials(tmp_path, kills=1, seed=int(time.time()))
    assert result["kills"] == result["resumed"] == result["identical_ends"] == 1, result
    assert result["lost_rounds"] == 0, result


@pytest.mark.slow
def test_ctrl_c_keeps_the_last_round_and_leaves_nothing_running(tmp_path, cache_dir):
    mark = f"ctrl-c-{os.getpid()}"
    given = [*kills.RUN, f"cache_dir={cache_dir}"]
    process = kills.start(tmp_path, mark, *given, "num_rounds=500")
    metrics = tmp_path / "latest" / "metrics.jsonl"
    while not metrics.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    began = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert process.returncode == 130, text
    last = text.splitlines()[-1]
    assert last.startswith("interrupted")
    assert "Traceback" not in text
    assert kills.await_end(mark) == 0
    done = len(metrics.read_text().splitlines())
    assert json.loads(metrics.read_text().splitlines()[-1])["round"] == done
