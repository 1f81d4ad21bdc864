"""Numbers of README and docs/ against the records below results/."""

import json
import re

import numpy as np
import pytest
from conftest import ROOT
from docs.pages import README, read
from federation.test_hostile import HOSTILE
from omegaconf import OmegaConf

from benchmarks.accuracy import tables
from benchmarks.accuracy.recorded import WIRES, wire_run
from benchmarks.performance import growth
from fedssl.reporting import console
from fedssl.runs.directory import RunDirectory
from fedssl.runs.metrics import RoundMetrics
from utils import build_schedule


def recorded(name):
    """Read a record."""
    return json.loads((ROOT / "results" / name).read_text())


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_the_tables_of_the_pages_are_those_of_the_recorded_runs(page):
    text = page.read_text()
    assert tables.fill(text) == text, "run python -m benchmarks.accuracy.tables"


@pytest.mark.parametrize("table", tables.TABLES)
def test_every_table_has_one_place(table):
    places = [page for page in tables.PAGES if f"<!-- {table} -->\n" in page.read_text()]
    assert len(places) == 1


def test_the_headlines_are_those_of_the_recorded_runs():
    _, _, ours, _, untrained, pixels, _ = tables.digits_table()[-2].split("|")
    budget = next(line for line in tables.budget_table() if line.startswith("| `cifar10_cpu`"))
    _, _, linear, _, random_encoder, raw, *_ = (part.strip() for part in budget.split("|"))
    readme = README.partition("## Start")[0]
    for digits, cifar10 in ((ours, linear), (untrained, random_encoder), (pixels, raw)):
        numbers = rf"\|[^|]*{re.escape(digits.strip())} %[^|]*\|[^|]*{re.escape(cifar10)} %[^|]*\|"
        assert re.search(numbers, readme), f"the headline lacks {digits.strip()} % and {cifar10} %"
    headline = read("docs/results.md").partition("## Digits")[0]
    for words in (
        f"give {ours.strip()} % top-1",
        f"a random encoder gives {untrained.split()[0]} %",
        f"logistic regression on the pixels {pixels.split()[0]} %",
        f"give {linear.split()[0]} % with 10 % of the labels",
        f"(a random encoder {random_encoder.split()[0]} %)",
    ):
        assert words in headline, words


def test_what_a_federation_is_worth_is_recorded():
    def both(name):
        seeds = tables.read_seeds(f"federation/{name}")
        cells = [tables.cell(seeds, "federated SimCLR", how) for how in ("linear head", "kNN")]
        return " / ".join(cell.partition(" ±")[0] for cell in cells)

    told = README.partition("What a federation is worth")[2].partition("## Start")[0]
    shown = re.findall(r"\d\d\.\d / \d\d\.\d", told)
    names = ["five", "two-classes", "alone", "two-classes-alone", "central-steps"]
    names += ["alone-steps", "of-20-20", "of-20-1", "of-20-steps-10"]
    assert shown == [both(name) for name in names]


def test_what_more_rounds_of_fewer_steps_give_is_recorded():
    text = read("docs/results.md").partition("More rounds of fewer steps")[2].partition("Of 20")[0]
    names = ["five-7-rounds", "five-14-rounds", "five", "five-plain", "alone"]
    shown = re.findall(r"\d\d\.\d / \d\d\.\d", text)
    assert shown == [tables.both_scores(f"federation/{name}", 1) for name in names]


def test_what_evaluations_take_is_recorded():
    rounds = [json.loads(t) for t in (ROOT / "results/federation/five/seed0/metrics.jsonl").open()]
    spent = sum(row["seconds_evaluate"] + row["seconds_knn"] for row in rounds)
    assert 0.38 < spent / sum(row["seconds"] for row in rounds) < 0.45
    seldom = [json.loads(t) for t in (ROOT / "results/methods/iid-moco/seed0/metrics.jsonl").open()]
    without, once = seldom[0]["bytes_moved"], seldom[6]["bytes_moved"]
    assert 0.30 < 1 - without / once < 0.37
    assert "two fifths of the time and a third of the bytes" in read("docs/usage.md")


def test_what_a_random_encoder_gives_beside_byol_is_recorded():
    (results,) = tables.read_seeds("methods/digits-byol")
    scores = [
        tables.find_score(results, "random encoder", how)["mean"] for how in ("linear head", "kNN")
    ]
    told = " / ".join(f"{100 * score:.1f}" for score in scores)
    assert f"both end below a random encoder ({told})" in read("docs/results.md")


def test_what_digits_of_two_classes_give_is_recorded():
    results = recorded("digits_two_classes_56_rounds/seed0/results.json")
    linear, knn = (
        tables.show(tables.find_score(results, "federated SimCLR", how)["top1"])
        for how in ("linear head", "kNN")
    )
    assert f"{linear} % (kNN {knn} %, seed 0)" in read("docs/results.md")


def test_what_the_readme_shows_of_a_run_is_what_a_run_shows(capsys):
    """Rounds and results of the recorded run, as the program prints them now."""
    with console.RoundProgress(7) as progress:
        for line in (ROOT / "results/digits/seed0/metrics.jsonl").open():
            progress.show(RoundMetrics.from_json(json.loads(line)))
    console.print_results(recorded("digits/seed0/results.json")[0])
    shown = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    block = README.partition("## What you see")[2].partition("```text\n")[2].partition("```")[0]
    lines = [line for line in block.splitlines() if line]
    begin = lines.index(shown[0])
    assert lines[begin : begin + len(shown)] == shown
    title, *opening = lines[:begin]
    assert title == "Federated SimCLR: 5 clients, 7 rounds of FedAvg"
    facts = {"data": "", "model": "", "running": "1 client\ndevice cpu", "directory": ""}
    console.print_opening(title, facts)
    expected = [line[:13] for line in capsys.readouterr().out.splitlines() if line][1:]
    assert [line[:13].ljust(13) for line in opening] == [line.ljust(13) for line in expected]


def test_what_the_readme_shows_of_the_end_is_what_a_run_shows(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block = README.partition("## What you see")[2].partition("```text\n")[2].partition("```")[0]
    end = block[block.index("Everything is in") :].splitlines()
    run = tmp_path / end[0].split()[-1]
    run.mkdir(parents=True)
    for name in " ".join(end[1:3]).replace(",", " ").split():
        (run / name).mkdir() if name.endswith("/") else (run / name).touch()
    console.print_ending(run, tmp_path / "outputs", labelled=True)
    assert capsys.readouterr().out.strip().splitlines() == end


def test_the_distances_of_a_federation_are_those_of_the_recorded_runs():
    def score(name, method):
        (results,) = tables.read_seeds(name)
        return 100 * tables.find_score(results, "federated SimCLR", method)["mean"]

    def gap(one, other):
        return [f"{score(one, how) - score(other, how):.1f}" for how in ("linear head", "kNN")]

    text = read("docs/results.md")
    name = "cifar10_cpu_seven_rounds"
    head, knn = gap(f"{name}_centralized", name)
    assert re.search(rf"stays {head} points\s+\(kNN {knn}\) below", text)
    head, knn = gap(name, f"{name}_client_alone")
    assert f"is {head} (kNN {knn}) above a client alone" in text
    for run, together in ((name, 1892), ("cifar10_cpu", 2240)):
        config = RunDirectory(ROOT / "results" / run / "seed0").load_config()
        plans = map(build_schedule(config).plan, range(1, config.num_rounds + 1))
        steps = sum(round(config.train.max_steps * plan.fraction) for plan in plans)
        assert steps == together
        assert f"({steps:,}" in text


def test_recorded_runs_tell_how_they_were_made():
    for file in (ROOT / "results").glob("**/results.json"):
        measured = json.loads(file.read_text())[0]["measured"]
        assert re.fullmatch(r"[0-9a-f]{40}", measured["commit"]), file
        assert measured["hardware"]["cores"] >= 1
        assert (file.parent / "config.yaml").is_file()
        planned = OmegaConf.load(file.parent / "config.yaml").num_rounds
        rounds = [json.loads(line) for line in (file.parent / "metrics.jsonl").open()]
        assert [row["round"] for row in rounds] == list(range(1, planned + 1))


@pytest.mark.parametrize(
    ("title", "count"), [("recipe", 4), ("5 clients a round, `cifar10_sweep` as it was then", 5)]
)
def test_the_gains_are_recorded_trials(title, count):
    page = (ROOT / "docs" / "experiments.md").read_text()
    table = page.partition(f"| {title} | linear head, % | kNN, % |\n")[2].partition("\n\n")[0]
    shown = [tuple(map(float, line.split("|")[2:4])) for line in table.splitlines()[1:]]
    trials = map(json.loads, (ROOT / "results" / "tuning.jsonl").open())
    scores = [trial["by_pixels"].get("32", {}) for trial in trials]
    assert len(shown) == count
    assert set(shown) <= {(score.get("linear_head"), score.get("knn")) for score in scores}


def test_the_trials_of_other_methods_are_recorded_with_their_settings():
    page = (ROOT / "docs" / "experiments.md").read_text()
    table = page.partition("| settings | linear head, % | kNN, % |\n")[2].partition("\n\n")[0]
    recorded_trials = set()
    for trial in map(json.loads, (ROOT / "results" / "tuning.jsonl").open()):
        score = trial["by_pixels"].get("32", {})
        chosen = frozenset(trial.get("overrides", ()))
        recorded_trials.add((chosen, score.get("linear_head"), score.get("knn")))
    lines = table.splitlines()[1:]
    assert len(lines) == 15
    for line in lines:
        settings = set(line.split("`")[1].split())
        head, knn = map(float, line.split("|")[2:4])
        found = [chosen for chosen, *scores in recorded_trials if scores == [head, knn]]
        assert any(settings <= chosen and "participants=[0]" in chosen for chosen in found), line


def test_the_cost_of_what_travels_is_the_recorded_one():
    """The table is compared with the records above."""
    for name, count in (("wire.json", 7), ("wire_apart.json", 4)):
        wire = recorded(name)
        assert re.fullmatch(r"[0-9a-f]{40}", wire["measured"]["commit"])
        assert len(wire["rows"]) == count


def test_what_rounding_costs_on_digits_is_recorded():
    text = read("docs/federation.md")
    scores, sent = {}, []
    for wire in WIRES:
        name = wire_run("digits", wire)
        for how in ("linear head", "converged head", "kNN"):
            rows = [
                tables.find_score(seed, "federated SimCLR", how) for seed in tables.read_seeds(name)
            ]
            scores[wire, how] = 100 * np.mean([row["mean"] for row in rows])
        if wire != "float32":
            sent.append(float(tables.bytes_a_round(name)[0]))
    apart = {key: value - scores["float32", key[1]] for key, value in scores.items()}
    assert f"within {max(map(abs, apart.values())):.1f} points" in text
    head, knn = apart["int8", "linear head"], apart["int8", "kNN"]
    assert f"int8's head {-head:.1f} below, its kNN {knn:.1f} above" in text
    assert f"{min(sent):.1f} to {max(sent):.1f} MB instead of 46" in text


def test_what_rounding_costs_in_the_sweep_is_recorded():
    text = read("docs/federation.md").replace("\n", " ")
    assert (
        "bfloat16, int8 and int4 lie within the spread of float32, but for bfloat16's kNN" in text
    )
    for how in ("linear head", "converged head", "kNN"):
        exact, *rounded = (
            [
                tables.find_score(seed, "federated SimCLR", how)["mean"]
                for seed in tables.read_seeds(wire_run("sweep", wire))
            ]
            for wire in WIRES
        )
        for wire, scores in zip(WIRES[1:], rounded, strict=True):
            assert len(scores) == len(exact) == 3
            less, spread = np.mean(exact) - np.mean(scores), np.std(exact, ddof=1)
            if (wire, how) == ("bfloat16", "kNN"):
                assert f"{100 * less:.1f} points lower" in text
            else:
                assert abs(less) < spread, (wire, how)


def test_what_masks_cost_on_digits_is_recorded():
    (masked,), (plain, *_) = map(tables.read_seeds, ("privacy/digits-secure", "digits_bfloat16"))
    for scores, words in ((masked, "with masks"), (plain, "without")):
        mean = tables.find_score(scores, "federated SimCLR", "linear head")["mean"]
        assert f"{100 * mean:.1f} % {words} ([recorded]" in read("docs/privacy.md")


def test_the_time_of_the_four_commands_is_the_recorded_one():
    measured, text = recorded("four_commands.json"), read("docs/federation.md")
    assert re.fullmatch(r"[0-9a-f]{40}", measured["measured"]["commit"])
    assert measured["overrides"] == []
    federated, simulated = measured["federated"], measured["simulated"]
    assert measured["ratio"] == pytest.approx(federated["wall_s"] / simulated["wall_s"])
    assert measured["ratio"] <= measured["limit"] == 2.5
    assert federated["eval_loss"] == pytest.approx(simulated["eval_loss"], rel=1e-6)
    assert f"took {federated['wall_s']:.0f} s on two cores" in text
    assert f"{simulated['wall_s']:.0f} s: {measured['ratio']:.1f} times as long" in text
    rounds, others = sum(federated["round_s"]), sum(simulated["round_s"])
    assert f"took {rounds:.0f} and {others:.0f} s, {rounds / others:.1f} times as long" in text
    messages, training = (np.array(federated[k]) for k in ("train_message_s", "training_s"))
    assert f"{np.median(messages - training.T):.0f} s beside the training" in text
    start = federated["start_s"]
    signs = ("run submitted", "ServerApp loaded, images open", "first messages sent")
    cells = [f"{start[name]:.1f}" for name in (*signs, "first round done")]
    assert f"| {' | '.join(cells)} |" in text


def test_the_exponents_of_growth_are_those_of_the_recorded_points():
    record = recorded("growth.json")
    assert re.fullmatch(r"[0-9a-f]{40}", record["measured"]["commit"])
    for name, rows in record["points"].items():
        points = [growth.Point(**row) for row in rows]
        assert growth.exponent_of(points)[0] == pytest.approx(record["exponents"][name], abs=1e-3)
        assert len(points) == 5
        assert (ROOT / "images" / f"cost_{name}.png").is_file()
        assert f"../images/cost_{name}.png" in read("docs/performance.md")


def test_every_attack_was_refused():
    record, text = recorded("attacks.json"), read("docs/federation.md")
    assert re.fullmatch(r"[0-9a-f]{40}", record["measured"]["commit"])
    assert len(record["attacks"]) >= 13
    for attack in record["attacks"]:
        assert attack["held"], attack
        assert re.search(attack["expected"], attack["seen"]), attack
    assert "results/attacks.json" in text


def test_the_speeds_are_the_recorded_ones():
    speed, text = recorded("speed.json"), read("docs/performance.md")
    assert len(speed["rows"]) == 6
    for milliseconds in speed["augmentation"]["milliseconds"].values():
        assert f"{milliseconds:.0f} ms" in text
    dropped = sum(row["dropped"] for row in speed["rows"])
    assert f"is dropped ({dropped} were)" in text
    medians = [row["images_per_second"] for row in speed["rows"]]
    over = [each["bare"] / each["usual"] for each in medians]
    assert f"the bare network is only {min(over):.1f} to {max(over):.1f} times" in text
    older = recorded("speed_float32.json")
    for name, words in (
        ("of_bare", "had {:.2f} to {:.2f} of the bare"),
        ("over_usual", "and {:.1f} to {:.1f} times that"),
    ):
        found = [row[name] for row in older["rows"]]
        assert words.format(min(found), max(found)) in text


def test_the_cost_of_a_simulation_is_the_recorded_one():
    text = read("docs/performance.md").replace("\n", " ")
    run, many = recorded("simulation.json"), recorded("scale.json")
    client = run["peak_client_mb"]
    for words in (
        f"`{run['command'].replace('python main.py dataset=cifar10 ', '')}`",
        f"took {run['wall_s']:.0f} s up to the encoder, {run['ratio']:.2f} times",
        f"held at most {client['rss']:.0f} MB",
        f"{client['cache_rss']:.0f} MB of them",
        f"{client['cuda_rss']:.0f} MB are of CUDA's",
        f"the start takes {run['startup_s']:.0f} s",
        f"{run['round_overhead_s']:.1f} s a round",
        f"it is {client['pss']:.0f} MB",
    ):
        assert words in text, words
    memory = many["own_mb_by_round"]
    assert f"{memory[2]} MB in the third round and {memory[-1]} MB in the last" in text
    assert f"rounds of `{many['command']}`" in text


def test_ten_thousand_clients_start_within_a_minute_and_need_no_more_memory():
    rows = {(row["clients"], row["ray_nodes"]): row for row in recorded("clients.json")["rows"]}
    assert rows.keys() == {*((10**power, 1) for power in (1, 2, 3, 4)), (10_000, 2)}
    many, most = rows[1_000, 1], rows[10_000, 1]
    assert all(row["startup_s"] < 60 for row in rows.values())
    assert max(most["own_mb_by_round"]) < 1.1 * max(many["own_mb_by_round"])
    assert most["own_mb_by_round"][-1] < 1.1 * most["own_mb_by_round"][1]  # flat


def test_the_kills_and_faults_are_recorded():
    kills, faults = recorded("kills.json"), recorded("faults.json")["faults"]
    assert kills["kills"] == kills["resumed"] == kills["identical_ends"]
    text = read("docs/reliability.md")
    assert f"{kills['kills']} runs killed at random moments" in text
    killed = [trial for trial in kills["trials"] if not trial.get("finished_before")]
    assert len(killed) == kills["kills"]
    assert {trial["after_round"] for trial in killed} == set(range(len(kills["phases_s"][0])))
    assert f"{len(kills['stopped_by_a_full_disk'])} more, listed apart" in text
    late = sum(trial["rounds_before"] > 0 for trial in killed)
    assert f"({late} of them after a completed round)" in text
    assert f"{kills['lost_rounds']} completed rounds lost, {kills['identical_ends']} ends" in text
    as_expected = sum(fault["ok"] for fault in faults)
    assert f"{len(faults)} faults injected into real runs, {as_expected} times" in text


def test_the_kinds_of_hostile_updates_are_counted():
    assert f"({len(HOSTILE)} kinds in one round" in read("docs/reliability.md")


def test_the_hostile_clients_are_recorded():
    poison, text = recorded("poison.json"), read("docs/reliability.md")
    assert f"`{poison['command']}`" in text
    for row in poison["rows"]:
        factor = f"{row['factor']:g}" if row["factor"] else "all honest"
        scores = f"{100 * row['linear_head']:.1f} | {100 * row['knn']:.1f} | {row['rejected']}"
        line = f"| {row['strategy']} | {factor} | {scores} |"
        assert line in text, line
