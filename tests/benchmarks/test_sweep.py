"""The recorded comparisons: what they have in common, and how their runs are made."""

import json
import os
import re
import time
from pathlib import Path

import pytest
from conftest import ROOT
from omegaconf import OmegaConf

from benchmarks.accuracy import recorded, sweep
from fedssl.config.compose import load_config
from fedssl.federation.resources import clients_per_round
from utils import build_schedule


@pytest.mark.parametrize("name", [name for name in recorded.COMPARED if name != "client-alone"])
def test_the_clients_of_a_comparison_take_the_same_steps_together(name):
    config = load_config("config", recorded.RUNS[f"sweep/{name}"])
    sampled = clients_per_round(config.num_clients, config.strategy.fraction_train)
    plans = map(build_schedule(config).plan, range(1, config.num_rounds + 1))
    steps = config.train.max_steps
    assert sampled * sum(round(plan.fraction * steps) for plan in plans) == 7 * 120
    images = 50_000 / config.num_clients * (1 - config.held_out)
    # so that no round is cut short by the end of its epochs
    assert steps <= images * config.train.local_epochs / config.train.batch_size


@pytest.mark.parametrize("name", recorded.FEDERATIONS)
def test_the_clients_of_a_federation_take_the_same_steps_each(name):
    config = load_config("config", recorded.RUNS[f"federation/{name}"])
    plans = map(build_schedule(config).plan, range(1, config.num_rounds + 1))
    steps = sum(round(plan.fraction * config.train.max_steps) for plan in plans)
    of_several = re.search(r"(?:steps|together)-(\d+)$", name)
    times = 5 if "the steps of all five" in recorded.FEDERATIONS[name][0] else 1
    assert steps == 168 * (int(of_several[1]) if of_several else times)
    assert config.train.batch_size == (320 if name == "central-batch" else 64)
    images = 50_000 / config.num_clients * (1 - config.held_out)
    assert config.train.max_steps <= images * config.train.local_epochs / config.train.batch_size


def test_the_older_comparisons_train_as_they_did():
    config = load_config("config", recorded.RUNS["sweep/clients-5"])
    record = OmegaConf.load(ROOT / "results" / "sweep" / "clients-5" / "seed1" / "config.yaml")
    assert config.num_rounds == record.num_rounds
    assert config.train.max_steps == record.train.max_steps
    rates = record.train.muon_learning_rate, record.train.learning_rate
    assert (config.optimizer.muon_learning_rate, config.optimizer.learning_rate) == rates
    assert config.optimizer.momentum_start == "zero"
    assert config.train.statistics == "averaged"


def test_the_sweep_refuses_a_run_that_it_does_not_know(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sweep.py", "--list", "--only", "clients-2"])
    with pytest.raises(SystemExit) as exit_:
        sweep.main()
    assert exit_.value.code == 2
    assert "--only=clients-2: there are" in capsys.readouterr().err


def test_the_sweep_takes_names_and_seeds_together(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "RESULTS", tmp_path)
    assert sweep.missing(["sweep/clients-2", "seed1"]) == [("sweep/clients-2", 1)]
    assert {seed for _, seed in sweep.missing(["seed2"])} == {2}
    done = tmp_path / "sweep" / "clients-2" / "seed0" / "commands.json"
    done.parent.mkdir(parents=True)
    done.touch()
    assert sweep.missing(["sweep/clients-2"]) == [("sweep/clients-2", 1), ("sweep/clients-2", 2)]
    more_seeds = set(recorded.RUNS) - recorded.ONE_SEED
    assert len(sweep.missing([])) == len(recorded.ONE_SEED) + 3 * len(more_seeds) - 1


def test_only_cifar10_needs_a_path(tmp_path, monkeypatch, capsys):
    assert not sweep.needs_path("digits")
    assert sweep.needs_path("federation/five")
    assert sweep.needs_path("cifar10_cpu_client_alone")
    ran = []
    monkeypatch.setattr(sweep, "RESULTS", tmp_path)
    monkeypatch.setattr(sweep, "run_one", lambda *run: ran.append((*run[:2], run[4])))
    monkeypatch.setattr("sys.argv", ["sweep.py", "--only", "digits"])
    sweep.main()
    assert ran == [("digits", seed, 1) for seed in recorded.SEEDS]
    monkeypatch.setattr("sys.argv", ["sweep.py", "--only", "federation/five"])
    with pytest.raises(SystemExit):
        sweep.main()
    assert "--path is missing" in capsys.readouterr().err


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core alone")
def test_runs_at_a_time_have_cores_of_their_own(tmp_path, monkeypatch):
    cores, seen = sorted(os.sched_getaffinity(0)), {}

    def look(name, seed, path, scratch, jobs, keep):
        seen.setdefault(frozenset(os.sched_getaffinity(0)), []).append(seed)
        time.sleep(0.2)

    monkeypatch.setattr(sweep, "RESULTS", tmp_path)
    monkeypatch.setattr(sweep, "run_one", look)
    monkeypatch.setattr("sys.argv", ["sweep.py", "--jobs=2", "--only", "digits"])
    sweep.main()
    half = len(cores) // 2
    assert seen.keys() == {frozenset(cores[:half]), frozenset(cores[half : 2 * half])}
    assert os.sched_getaffinity(0) == set(cores)


def test_a_failed_run_ends_the_sweep(tmp_path, monkeypatch):
    ran = []

    def fail(name, seed, *more):
        ran.append(seed)
        raise SystemExit("failed: python main.py")

    monkeypatch.setattr(sweep, "RESULTS", tmp_path)
    monkeypatch.setattr(sweep, "run_one", fail)
    monkeypatch.setattr("sys.argv", ["sweep.py", "--only", "digits"])
    with pytest.raises(SystemExit, match="failed"):
        sweep.main()
    assert len(ran) < len(recorded.SEEDS)


@pytest.mark.parametrize("changed", [False, True])
def test_an_interrupted_run_of_the_sweep_goes_on_where_it_was_with_the_same_recipe(
    tmp_path, monkeypatch, changed
):
    ran = []

    def stop_at_the_third(command):
        ran.append(command[0])
        if len(ran) == 3:
            raise SystemExit("failed")
        run = Path(command[-1].removeprefix("run_dir=").removeprefix("run="))
        run.mkdir(parents=True, exist_ok=True)
        names = ("output_dir", "run_dir", "cache_dir")
        (run / "config.yaml").write_text(
            json.dumps({"dataset": {"path": "x"}} | dict.fromkeys(names))
        )
        for name in ("metrics.jsonl", "results.json"):
            (run / name).touch()
        return 1.23

    monkeypatch.setattr(sweep, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sweep, "time_command", stop_at_the_third)
    with pytest.raises(SystemExit, match="failed"):
        sweep.run_one("sweep/centralized", 0, "cifar10", tmp_path / "scratch")
    assert not (tmp_path / "results").exists()
    if changed:
        more = [*recorded.RUNS["sweep/centralized"], "method.temperature=0.2"]
        monkeypatch.setitem(recorded.RUNS, "sweep/centralized", more)
    sweep.run_one("sweep/centralized", 0, "cifar10", tmp_path / "scratch")
    again = ["main.py", "test.py", "test.py"] if changed else ["test.py"]
    assert ran == ["main.py", "test.py", "test.py", *again]
    record = tmp_path / "results" / "sweep" / "centralized" / "seed0"
    told = json.loads((record / "commands.json").read_text())
    assert [line["wall_s"] for line in told] == [1.2] * 3
    assert told[0]["command"].startswith("python main.py experiment=cifar10_sweep num_rounds=7")
    assert " num_clients=1 " in told[0]["command"]
    assert "path: null" in (record / "config.yaml").read_text()
