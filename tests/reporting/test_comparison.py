"""Gathering runs into a table and a plot: known inputs, known numbers."""

import json
import re
import subprocess
import sys

import pandas as pd
import pytest
from omegaconf import OmegaConf

from fedssl.config.compose import load_config
from fedssl.errors import UserError
from fedssl.reporting.comparison import find_runs, gather, read_scores, summarize, to_markdown
from fedssl.runs.directory import RunDirectory
from fedssl.runs.metrics import RoundMetrics
from scripts import compare


def make_run(folder, top1, overrides=(), fraction=0.1):
    """Write the small files of a run whose linear head reached `top1`."""
    folder.mkdir(parents=True)
    config = load_config("config", list(overrides))
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
    rows = [
        {"encoder": "federated SimCLR", "method": "linear head", "mean": top1},
        {"encoder": "random encoder", "method": "linear head", "mean": 0.5},
    ]
    result = {"protocol": {"label_fraction": fraction}, "rows": rows}
    (folder / "results.json").write_text(json.dumps([result]))
    rounds = [RoundMetrics(1, seconds=90), RoundMetrics(2, seconds=30)]
    RunDirectory(folder).write_metrics(rounds)


@pytest.fixture
def sweep(tmp_path):
    for clients, seed, top1 in ((2, 0, 0.60), (2, 1, 0.70), (10, 0, 0.40), (10, 1, 0.50)):
        make_run(tmp_path / f"{clients}-{seed}", top1, [f"num_clients={clients}", f"seed={seed}"])
    return tmp_path


def test_scores_are_percent_and_named_by_encoder_method_and_labels(tmp_path):
    make_run(tmp_path / "run", 0.625, fraction=0.02)
    (run,) = find_runs([tmp_path])
    assert read_scores(run) == {
        "linear head, 2 %": 62.5,
        "random encoder, linear head, 2 %": 50.0,
        "minutes": 2.0,
    }


def test_a_score_on_other_images_is_of_a_kind_of_its_own(tmp_path):
    make_run(tmp_path / "run", 0.6)
    file = tmp_path / "run" / "results.json"
    (own,) = json.loads(file.read_text())
    for marked in ({"dataset": "imagefolder labelled", "own_images": False}, {"dataset": "old"}):
        other = {**own, **marked, "rows": [{**own["rows"][0], "mean": 0.9}]}
        file.write_text(json.dumps([{**own, "dataset": "digits"}, other]))
        (run,) = find_runs([tmp_path])
        scores = read_scores(run)
        assert scores["linear head, 10 %"] == 60
        assert scores[f"linear head, 10 % of {marked['dataset']}"] == 90


def test_seeds_are_averaged_and_only_what_differs_is_shown(sweep):
    frame, settings, empty = gather(find_runs([sweep]))
    assert settings == ["num_clients"]
    assert empty == []
    table = summarize(frame, settings)
    assert list(table.index) == [2, 10]
    assert table["runs", ""].tolist() == [2, 2]
    assert table["linear head, 10 %", "mean"].tolist() == pytest.approx([65, 45])
    assert table["linear head, 10 %", "std"].tolist() == pytest.approx([50**0.5] * 2)
    lines = to_markdown(table).splitlines()
    head = (
        "| num_clients | runs | linear head, 10 % | random encoder, linear head, 10 % | minutes |"
    )
    assert lines[0] == head
    assert lines[2] == "| 2 | 2 | 65.0 ± 7.1 | 50.0 ± 0.0 | 2.0 ± 0.0 |"


def test_a_setting_that_an_older_run_did_not_know_is_no_difference(tmp_path):
    for name in ("older", "newer"):
        make_run(tmp_path / name, 0.5, ["train.round_fractions=[]"])
    file = tmp_path / "older" / "config.yaml"
    config = OmegaConf.load(file)
    del config.train["round_fractions"]
    file.write_text(OmegaConf.to_yaml(config))
    assert gather(find_runs([tmp_path]))[1] == []
    make_run(tmp_path / "short", 0.5, ["train.round_fractions=[0.5,1]"])
    assert gather(find_runs([tmp_path]))[1] == ["train.round_fractions"]


def test_what_a_choice_brings_along_is_not_told_twice(tmp_path):
    for partition in ("iid", "dirichlet"):
        for seed in (0, 1):
            chosen = [f"partition={partition}", f"seed={seed}"]
            make_run(tmp_path / f"{partition}{seed}", 0.5, chosen)
    frame, settings, _ = gather(find_runs([tmp_path]))
    assert settings == ["partition._target_"]
    lines = to_markdown(summarize(frame, settings)).splitlines()
    assert [line.split(" | ")[:2] for line in (lines[0], *lines[2:])] == [
        ["| partition", "runs"],
        ["| Dirichlet", "2"],
        ["| Iid", "2"],
    ]
    make_run(tmp_path / "other", 0.5, ["partition=dirichlet", "partition.alpha=0.1"])
    _, settings, _ = gather(find_runs([tmp_path]))
    assert settings == ["partition._target_", "partition.alpha"]


def test_a_single_run_has_no_spread(tmp_path):
    make_run(tmp_path / "run", 0.6)
    frame, settings, _ = gather(find_runs([tmp_path]))
    assert settings == []
    assert to_markdown(summarize(frame, settings)).splitlines()[2] == "| 1 | 60.0 | 50.0 | 2.0 |"


def test_a_run_that_was_repeated_counts_once(tmp_path):
    for number, top1 in enumerate((0.5, 0.6)):
        make_run(tmp_path / f"run{number}", top1, ["seed=0"])
    make_run(tmp_path / "run2", 0.8, ["seed=1"])
    frame, settings, _ = gather(find_runs([tmp_path]))
    assert to_markdown(summarize(frame, settings)).splitlines()[2].startswith("| 2 | 70.0 ± 14.1 |")


def test_the_score_of_the_last_round_counts(tmp_path):
    make_run(tmp_path / "run", 0.6)
    file = tmp_path / "run" / "results.json"
    (own,) = json.loads(file.read_text())
    rows = [{**own["rows"][0], "mean": 0.9}]
    file.write_text(json.dumps([{**own, "round": 7}, {**own, "round": 5, "rows": rows}]))
    assert read_scores(find_runs([tmp_path])[0])["linear head, 10 %"] == 60


def test_runs_without_an_evaluation_are_named(tmp_path, sweep):
    (tmp_path / "10-1" / "results.json").unlink()
    frame, _, (empty,) = gather(find_runs([sweep]))
    assert len(frame) == 3
    assert empty.path.name == "10-1"


def test_latest_is_not_counted_twice(sweep):
    (sweep / "latest").symlink_to("2-0")
    assert len(find_runs([sweep])) == 4
    assert len(find_runs([sweep / "latest"])) == 1
    (sweep / "latest").unlink()
    sweep.rename(sweep.parent / "latest")
    assert len(find_runs([sweep.parent / "latest"])) == 4


def test_a_place_without_runs_is_named(tmp_path):
    with pytest.raises(UserError, match="no run there or below"):
        find_runs([tmp_path])


def test_the_command_writes_table_lines_and_plot(sweep, tmp_path, monkeypatch):
    command = [sys.executable, "-m", "scripts.compare", str(sweep)]
    done = subprocess.run(
        [*command, f"--out={tmp_path}/alpha_0.1"], capture_output=True, text=True, check=True
    )
    assert "| 10 | 2 | 45.0 ± 7.1 |" in done.stdout
    assert (tmp_path / "alpha_0.1.md").read_text() in done.stdout
    lines = pd.read_csv(tmp_path / "alpha_0.1.csv")
    assert sorted(lines["linear head, 10 %"]) == pytest.approx([40, 50, 60, 70])
    assert (tmp_path / "alpha_0.1.png").read_bytes().startswith(b"\x89PNG")
    wrong = subprocess.run([*command, "--metric=speed"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: --metric=speed: not among these runs; known: ")
    assert len(wrong.stderr.splitlines()) == 1
    for flag in ("--metric=num_clients", "--out=.", "--out=/nowhere/x"):
        monkeypatch.setattr(sys, "argv", ["compare", str(sweep), flag])
        with pytest.raises(UserError, match=f"^{re.escape(flag)}[^\n]*$"):
            compare.main()


def mark(folder, *marks):
    """Say of a run's evaluation which images it was made on; of several, it is there as often."""
    file = folder / "results.json"
    (entry,) = json.loads(file.read_text())
    file.write_text(json.dumps([{**entry, "seed": 0, **each} for each in marks]))


def test_runs_on_folders_of_different_names_are_not_averaged(tmp_path):
    for name, top1 in (("cats", 0.9), ("cars|vans", 0.1)):
        make_run(tmp_path / name, top1, ["dataset=imagefolder"])
        mark(tmp_path / name, {"dataset": f"imagefolder {name}", "own_images": True, "images": "0"})
    frame, settings, _ = gather(find_runs([tmp_path]))
    assert settings == ["dataset.name"]
    lines = to_markdown(summarize(frame, settings)).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| imagefolder cars\\|vans",
        "| imagefolder cats",
    ]


def test_images_of_one_name_and_different_content_are_told_apart(tmp_path):
    make_run(tmp_path / "run", 0.6)
    other = {"dataset": "imagefolder labelled", "own_images": False}
    mark(tmp_path / "run", {**other, "images": "a" * 64}, {**other, "images": "b" * 64})
    frame, _, _ = gather(find_runs([tmp_path]))
    for content in ("aaaaaaaa", "bbbbbbbb"):
        assert frame[f"linear head, 10 % of imagefolder labelled {content}"].tolist() == [60]
