"""The repository against its README and its own rules."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks.accuracy import sweep, tables
from fedssl.config.command_line import flags_to_overrides
from fedssl.config.compose import load_config
from fedssl.federation.resources import clients_per_round
from fedssl.training.schedule import plan_round
from scripts.embed import name_folder

ENTRIES = {f"{name}.py": name for name in ("test", "report", "embed", "export")}
ENTRIES["main.py"] = "config"  # and their configurations
README = (ROOT / "README.md").read_text()


def tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    return listed.stdout.splitlines()


def test_imports_run_one_way():
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_one_module_calls_the_simulation():
    files = [ROOT / path for path in tracked() if path.endswith(".py")]
    shipped = [file for file in files if not file.is_relative_to(ROOT / "tests")]
    callers = [file for file in shipped if "flwr.simulation" in file.read_text()]
    (caller,) = (str(file.relative_to(ROOT)) for file in callers)
    assert caller in ("fedssl/federation/simulation.py", "main.py")  # main.py until it is split


def test_the_tree_in_the_readme_is_the_repository():
    tree = re.search(r"```text\n(.*?)```", README.partition("## What is here")[2], re.DOTALL)[1]
    lines = [line for line in tree.splitlines() if line.startswith(("├", "└"))]
    shown = {line.split()[1].rstrip("/") for line in lines}
    there = {Path(path).parts for path in tracked()}
    names = {parts[0] for parts in there}
    telling = {parts[0] for parts in there if len(parts) > 1 or parts[0].endswith(".py")}
    assert {name for name in telling if not name.startswith(".")} <= shown <= names


def commands():
    """List every command of the README's shell blocks, continuation lines joined."""
    for block in re.findall(r"```(?:bash|shell)\n(.*?)```", README, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


@pytest.mark.parametrize("words", [w for w in commands() if w[0] == "python"], ids=" ".join)
def test_the_readmes_commands_are_valid(words):
    script, arguments = words[1], words[2:]
    assert (ROOT / script).is_file()
    if script in ENTRIES:
        overrides = [a for a in flags_to_overrides(arguments) if not a.startswith("-")]
        overrides = [re.sub(r"=([^\[,]*),.*", r"=\1", override) for override in overrides]
        overrides = name_folder(overrides) if script == "embed.py" else overrides
        load_config(ENTRIES[script], overrides)


def test_the_readme_documents_the_four_commands_of_a_federation():
    four = [
        ["flower-superlink", "--insecure"],
        ["flower-client-app", "app:client1", "--insecure"],
        ["flower-client-app", "app:client2", "--insecure"],
        ["flower-server-app", "app:server", "--insecure"],
    ]
    listed = list(commands())
    place = listed.index(four[0])
    assert listed[place : place + 4] == four


def test_the_readme_has_one_line_for_each_set_up():
    lines = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(lines) == 2
    assert lines[0].endswith("python main.py")
    assert lines[1].endswith("python -m pytest")


def test_the_readmes_files_and_links_exist():
    for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", README):
        path = next(filter(None, target))
        if not path.startswith("http"):
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("requirements.txt", "-e ."),  # its commands
        ("requirements-dev.txt", "-r requirements.txt"),
    ],
)
def test_requirements_are_exact(name, other):
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    lines = [line for line in lines if line]
    assert other in lines
    for line in lines:
        assert line == other or re.fullmatch(r"[\w.-]+(\[\w+\])?==[\w.]+", line), line


def test_the_readmes_tables_are_those_of_the_recorded_runs():
    assert tables.fill(README) == README, "run python -m benchmarks.accuracy.tables"
    _, _, ours, _, random_encoder, pixels, _ = tables.digits_table()[-2].split("|")
    headline = README.partition("## Start")[0]
    for number in (ours, random_encoder.split()[0], pixels.split()[0]):
        assert f"{number.strip()} %" in headline, f"the headline lacks: {number} %"
    budget = next(line for line in tables.budget_table() if line.startswith("| `cifar10_cpu`"))
    _, _, linear, _, untrained, *_ = budget.split("|")
    text = " ".join(headline.split())
    assert f"gives {linear.split()[0]} % with 10 % of the labels" in text
    assert f"encoder {untrained.split()[0]} %)" in text


def test_the_readmes_distances_of_a_federation_are_those_of_the_recorded_runs():
    def score(name, method):
        (results,) = tables.read_seeds(name)
        return 100 * tables.find_score(results, "federated SimCLR", method)["mean"]

    def gap(one, other):
        return [f"{score(one, how) - score(other, how):.1f}" for how in ("linear head", "kNN")]

    text = " ".join(README.split())
    head, knn = gap("cifar10_cpu_centralized", "cifar10_cpu")
    assert f"stays {head} points (kNN {knn}) below" in text
    head, knn = gap("cifar10_cpu", "cifar10_cpu_client_alone")
    assert f"is {head} (kNN {knn}) above a client alone" in text
    train = load_config("config", sweep.RUNS["cifar10_cpu"]).train
    steps = sum(round(train.max_steps * plan_round(train, n, 7)[0]) for n in range(1, 8))
    assert f"({steps:,} of {train.batch_size} images" in text


@pytest.mark.parametrize("name", [name for name in sweep.COMPARED if name != "client-alone"])
def test_the_clients_of_a_comparison_take_the_same_steps_together(name):
    config = load_config("config", sweep.RUNS[f"sweep/{name}"])
    sampled = clients_per_round(config.num_clients, config.strategy.fraction_train)
    rounds = range(1, config.num_rounds + 1)
    lengths = [plan_round(config.train, n, config.num_rounds)[0] for n in rounds]
    steps = config.train.max_steps
    assert sampled * sum(round(length * steps) for length in lengths) == 7 * 120
    images = 50_000 / config.num_clients * (1 - config.held_out)
    # so that no round is cut short by the end of its epochs
    assert steps <= images * config.train.local_epochs / config.train.batch_size


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
        more = [*sweep.RUNS["sweep/centralized"], "train.temperature=0.2"]
        monkeypatch.setitem(sweep.RUNS, "sweep/centralized", more)
    sweep.run_one("sweep/centralized", 0, "cifar10", tmp_path / "scratch")
    again = ["main.py", "test.py", "test.py"] if changed else ["test.py"]
    assert ran == ["main.py", "test.py", "test.py", *again]
    record = tmp_path / "results" / "sweep" / "centralized" / "seed0"
    told = json.loads((record / "commands.json").read_text())
    assert [line["wall_s"] for line in told] == [1.2] * 3
    assert told[0]["command"].startswith("python main.py experiment=cifar10_sweep num_clients=1")
    assert "path: null" in (record / "config.yaml").read_text()


def test_a_table_tells_mean_and_spread_of_what_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for seed, top1 in enumerate((0.5, 0.6)):
        folder = tmp_path / "sweep" / "clients-5" / f"seed{seed}"
        folder.mkdir(parents=True)
        row = {"encoder": "federated SimCLR", "method": "linear head", "mean": top1}
        result = {"mode": "linear", "protocol": {"label_fraction": 0.1}, "rows": [row]}
        (folder / "results.json").write_text(json.dumps([result]))
    _, _, *lines = tables.comparison_table()
    assert lines[0] == "| 5 clients, IID, FedAvg | | 55.0 ± 7.1 | | | | 2 |"
    assert lines[1] == "| random encoder | | | | | | 2 |"  # nothing in between is recorded


def test_recorded_runs_tell_how_they_were_made():
    for file in (ROOT / "results").glob("**/results.json"):
        measured = json.loads(file.read_text())[0]["measured"]
        assert re.fullmatch(r"[0-9a-f]{40}", measured["commit"]), file
        assert measured["hardware"]["cores"] >= 1
        assert (file.parent / "config.yaml").is_file()
        rounds = [json.loads(line) for line in (file.parent / "metrics.jsonl").open()]
        assert [row["round"] for row in rounds] == list(range(1, 8))


@pytest.mark.parametrize(
    ("title", "count"), [("recipe", 4), ("5 clients a round, experiment `cifar10_sweep`", 5)]
)
def test_the_readmes_gains_are_recorded_trials(title, count):
    table = README.partition(f"| {title} | linear head, % | kNN, % |\n")[2].partition("\n\n")[0]
    shown = [tuple(map(float, line.split("|")[2:4])) for line in table.splitlines()[1:]]
    trials = map(json.loads, (ROOT / "results" / "tuning.jsonl").open())
    scores = [trial["by_pixels"].get("32", {}) for trial in trials]
    assert len(shown) == count
    assert set(shown) <= {(score.get("linear_head"), score.get("knn")) for score in scores}


def test_the_readmes_cost_of_the_wire_is_the_recorded_one():
    recorded = json.loads((ROOT / "results" / "wire.json").read_text())
    assert re.fullmatch(r"[0-9a-f]{40}", recorded["measured"]["commit"])
    assert len(recorded["rows"]) == 8
    for row in recorded["rows"]:
        kind = "one array" if row["packed"] else "each on its own"
        line = (
            f"| {row['encoder']} | {kind} | {row['delay_ms']:.0f} ms | {row['requests']:.0f} "
            f"| {row['down_mb']:.0f} MB | {row['up_mb']:.0f} MB | {row['seconds']:.0f} s |"
        )
        assert line in README, f"the README lacks: {line}"


def test_the_readmes_speeds_are_the_recorded_ones():
    speed = recorded("speed.json")
    assert len(speed["rows"]) == 6
    for row in speed["rows"]:
        speeds = " | ".join(f"{row['images_per_second'][k]:.0f}" for k in ("ours", "bare", "usual"))
        line = (
            f"| {row['encoder']} | {row['stem']} | {row['batch']} | {speeds} "
            f"| {row['of_bare']:.2f} | {row['over_usual']:.1f} |"
        )
        assert line in README, f"the README lacks: {line}"
    for milliseconds in speed["augmentation"]["milliseconds"].values():
        assert f"{milliseconds:.0f} ms" in README


def test_the_readmes_cost_of_a_simulation_is_the_recorded_one():
    text = " ".join(README.split())
    run, many = recorded("simulation.json"), recorded("scale.json")
    client = run["peak_client_mb"]
    for words in (
        f"`{run['command'].replace('python main.py dataset=cifar10 ', '')}`",
        f"took {run['wall_s']:.0f} s up to the encoder, {run['ratio']:.2f} times",
        f"held at most {client['rss']:.0f} MB",
        f"{client['cache_rss']:.0f} MB of them",
        f"{client['pss']:.0f} MB where",
    ):
        assert words in text, words
    memory = many["own_mb_by_round"]
    assert f"{memory[2]} MB in the third round and {memory[-1]} MB in the last" in text
    assert f"rounds of `{many['command']}`" in text


def recorded(name):
    return json.loads((ROOT / "results" / name).read_text())


def test_the_readmes_kills_and_faults_are_recorded():
    kills, faults = recorded("kills.json"), recorded("faults.json")["faults"]
    assert kills["kills"] == kills["resumed"] == kills["identical_ends"]
    text = " ".join(README.split())
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


def test_the_readmes_hostile_clients_are_recorded():
    poison = recorded("poison.json")
    assert f"`{poison['command']}`" in README
    for row in poison["rows"]:
        factor = f"{row['factor']:g}" if row["factor"] else "all honest"
        scores = f"{100 * row['linear_head']:.1f} | {100 * row['knn']:.1f} | {row['rejected']}"
        line = f"| {row['strategy']} | {factor} | {scores} |"
        assert line in README, f"the README lacks: {line}"
