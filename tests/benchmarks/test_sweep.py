"""The recorded comparisons: what they have in common, and how their runs are made."""

import json
from pathlib import Path

import pytest
from conftest import ROOT
from omegaconf import OmegaConf

from benchmarks.accuracy import sweep
from fedssl.config.compose import load_config
from fedssl.federation.resources import clients_per_round
from utils import build_schedule


@pytest.mark.parametrize("name", [name for name in sweep.COMPARED if name != "client-alone"])
def test_the_clients_of_a_comparison_take_the_same_steps_together(name):
    config = load_config("config", sweep.RUNS[f"sweep/{name}"])
    sampled = clients_per_round(config.num_clients, config.strategy.fraction_train)
    plans = map(build_schedule(config).plan, range(1, config.num_rounds + 1))
    steps = config.train.max_steps
    assert sampled * sum(round(plan.fraction * steps) for plan in plans) == 7 * 120
    images = 50_000 / config.num_clients * (1 - config.held_out)
    # so that no round is cut short by the end of its epochs
    assert steps <= images * config.train.local_epochs / config.train.batch_size


@pytest.mark.parametrize("name", sweep.FEDERATIONS)
def test_the_clients_of_a_federation_take_the_same_steps_each(name):
    config = load_config("config", sweep.RUNS[f"federation/{name}"])
    plans = map(build_schedule(config).plan, range(1, config.num_rounds + 1))
    steps = sum(round(plan.fraction * config.train.max_steps) for plan in plans)
    times = 5 if "the steps of all five" in sweep.FEDERATIONS[name][0] else 1
    assert steps == 168 * times
    assert config.train.batch_size == (320 if name == "central-batch" else 64)
    images = 50_000 / config.num_clients * (1 - config.held_out)
    assert config.train.max_steps <= images * config.train.local_epochs / config.train.batch_size


def test_the_older_comparisons_train_as_they_did():
    config = load_config("config", sweep.RUNS["sweep/clients-5"])
    recorded = OmegaConf.load(ROOT / "results" / "sweep" / "clients-5" / "seed1" / "config.yaml")
    assert config.num_rounds == recorded.num_rounds
    assert config.train.max_steps == recorded.train.max_steps
    rates = recorded.train.muon_learning_rate, recorded.train.learning_rate
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
    more_seeds = set(sweep.RUNS) - sweep.ONE_SEED
    assert len(sweep.missing([])) == len(sweep.ONE_SEED) + 3 * len(more_seeds) - 1


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
        more = [*sweep.RUNS["sweep/centralized"], "method.temperature=0.2"]
        monkeypatch.setitem(sweep.RUNS, "sweep/centralized", more)
    sweep.run_one("sweep/centralized", 0, "cifar10", tmp_path / "scratch")
    again = ["main.py", "test.py", "test.py"] if changed else ["test.py"]
    assert ran == ["main.py", "test.py", "test.py", *again]
    record = tmp_path / "results" / "sweep" / "centralized" / "seed0"
    told = json.loads((record / "commands.json").read_text())
    assert [line["wall_s"] for line in told] == [1.2] * 3
    assert told[0]["command"].startswith("python main.py experiment=cifar10_sweep num_rounds=7")
    assert " num_clients=1 " in told[0]["command"]
    assert "path: null" in (record / "config.yaml").read_text()
