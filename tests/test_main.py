"""main.py and test.py as a user starts them: real processes, Ray and all."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from conftest import ROOT, in_terminal, screen
from ray.cluster_utils import Cluster
from safetensors import safe_open
from safetensors.torch import load_file

import main as program
import test as evaluation
from benchmarks.performance.simulation import own_memory
from fedssl.config.command_line import run_entry
from fedssl.config.compose import load_config
from fedssl.runs.directory import RunDirectory
from fedssl.runs.resume import with_earlier_overrides
from utils import open_partitions, plain

SMALL = [
    "--num_clients=2",
    "--num_cpus=1",
    "--num_rounds",
    "2",
    "train.local_epochs=1",
    "train.max_steps=4",
    "figures.map_images=5",
]
FAST = "model.stem=imagenet"  # small images shrink to a point at once: little to compute


def start(script, *arguments, **environment):
    return subprocess.run(
        [sys.executable, *script.split(), *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | environment,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache_dir):
    """One whole run of main.py with 2 clients and 2 rounds on digits."""
    output = tmp_path_factory.mktemp("outputs")
    places = [f"output_dir={output}", f"cache_dir={cache_dir}"]
    done = start("main.py", *SMALL, *places, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 0, done.stdout + done.stderr
    return output, done


def test_the_opening_lines_say_what_runs_where(finished):
    text = finished[1].stdout
    assert "2 clients, 2 rounds of FedAvg" in text
    assert "digits, 1,437 images of 8 x 8 pixels" in text
    assert "at a time, each on" in text
    assert "precision " in text
    assert "device cpu" in text or "device cuda" in text


def test_the_terminal_stays_quiet(finished):
    done = finished[1]
    assert done.stderr == ""
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    assert len(lines) == len(set(lines)) < 40
    for noise in ("WARN", "INFO", "Deprecat", "ray", "Error"):
        assert noise not in done.stdout.replace("gray", "")


def test_the_ending_says_where_everything_lies_and_what_is_next(finished):
    output, done = finished
    run = (output / "latest").resolve()
    assert f"Everything is in {run}" in done.stdout
    assert "python test.py eval=finetune" in done.stdout


def test_every_promised_file_is_there(finished):
    run = (finished[0] / "latest").resolve()
    names = {file.name for file in run.iterdir()}
    promised = {"config.yaml", "metrics.jsonl", "results.json", "encoder.safetensors"}
    promised |= {"overrides.yaml", "report.html", "figures"}
    assert promised | {"checkpoints", "loss_graph.png"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    graph = matplotlib.image.imread(run / "loss_graph.png")
    assert graph.shape[1] > 600
    assert graph.std() > 0.05


def test_the_metrics_hold_all_clients_losses(finished):
    lines = (finished[0] / "latest" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["round"] for row in rows] == [1, 2]
    for row in rows:
        assert [client["partition"] for client in row["clients"]] == [0, 1]
        # 1,437 images, half each, a tenth held out
        assert [client["num_examples"] for client in row["clients"]] == [647, 646]
        assert 0 < row["train_loss"] < np.log(2 * 64)
        assert row["failures"] == []


def test_the_encoder_loads_into_plain_torchvision(finished):
    file = finished[0] / "latest" / "encoder.safetensors"
    with safe_open(file, framework="pt") as opened:
        facts = opened.metadata()
    assert (facts["architecture"], facts["stem"]) == ("resnet18", "conv3x3_stride1")
    assert (facts["dataset"], facts["rounds"]) == ("digits", "2")
    plain = torchvision.models.resnet18()
    plain.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    missing, unexpected = plain.load_state_dict(load_file(file), strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])


def test_test_py_evaluates_the_latest_run_and_keeps_earlier_results(finished, cache_dir):
    output, first = finished
    before = {f: f.read_bytes() for f in (output / "latest" / "checkpoints").iterdir()}
    asked = ["--quiet", f"--run={output}/latest", "seeds=2", f"cache_dir={cache_dir}"]
    done = start("test.py", *asked)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Linear evaluation on digits: ")
    assert len(lines) == 9  # the table alone
    results = json.loads((output / "latest" / "results.json").read_text())
    assert len(results) == 2
    assert len(results[1]["rows"][0]["top1"]) == 2
    # The same protocol on the same checkpoint gives the same number again.
    assert results[1]["rows"][0]["top1"] == results[0]["rows"][0]["top1"][:2]
    assert "360 test images" in done.stdout
    assert "raw pixels" in first.stdout
    assert all(file.read_bytes() == data for file, data in before.items())


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_even_on_a_ray_cluster_of_two_nodes(
    finished, tmp_path, cache_dir
):
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        places = [f"output_dir={tmp_path}", f"cache_dir={cache_dir}"]
        done = start("main.py", *SMALL, f"ray_address={cluster.address}", *places)
    finally:
        cluster.shutdown()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "2 clients at a time, each on 1 CPU core:" in done.stdout
    assert f"1 on {socket.gethostname()}, 1 on {socket.gethostname()}" in done.stdout
    last = "latest/checkpoints/round-0002.safetensors"
    assert (tmp_path / last).read_bytes() == (finished[0] / last).read_bytes()


@pytest.mark.slow
def test_cifar10_goes_the_whole_way(tmp_path, cache_dir, cifar10):
    """All 10,000 test images count."""
    data = ["dataset=cifar10", f"dataset.path={cifar10}", "monitor.bank=200", "monitor.queries=100"]
    data += ["eval.seeds=1", "eval.label_fraction=0.02", "eval.baselines=false", "held_out=0.01"]
    data += ["train.train_resolutions=[16]", "figures.map_images=5"]
    output = tmp_path / "outputs"
    places = [f"output_dir={output}", f"cache_dir={cache_dir}"]
    done = start("main.py", "--quiet", *data, "num_rounds=1", "train.max_steps=1", FAST, *places)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Linear evaluation on cifar10: ")
    _, _, *table = filter(str.strip, lines)  # and nothing but the table
    assert [line.split()[:2] for line in table] == [["federated", "SimCLR"]] * 3
    (result,) = json.loads((output / "latest" / "results.json").read_text())
    assert result["test_images"] == 10_000
    assert result["labelled_images"] == 1_000


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "pathological"])
def test_every_way_to_deal_out_the_images_is_ready_to_start(tmp_path, cache_dir, kind):
    """With what refers to other values, as the partition's seed does."""
    places = [f"run_dir={tmp_path}/run", f"cache_dir={cache_dir}"]
    _, image_set = program.prepare(load_config("config", [f"partition={kind}", *places]))
    assert len(image_set.train.pixels) == 1437


def test_the_opening_says_how_many_images_are_dealt_out(tmp_path, cache_dir):
    given = ["partition=pathological", "num_clients=2", f"cache_dir={cache_dir}"]
    config = load_config("config", [*given, f"run_dir={tmp_path}/run"])
    resources, image_set = program.prepare(config)
    dealt = sum(map(len, open_partitions(config, image_set)))
    run = RunDirectory.create(tmp_path / "run", plain(config), str(tmp_path), given)
    told = program.describe(config, resources, image_set, run)["data"]
    assert 400 < dealt < 700
    assert told.startswith(f"digits, {dealt} of 1,437 images of 8 x 8 pixels, dealt out by")


@pytest.mark.slow
def test_memory_does_not_grow_over_rounds(tmp_path, cache_dir):
    """Four virtual clients, two at a time, eight rounds: the processes' own memory."""
    arguments = ["num_clients=4", "num_rounds=8", "train.local_epochs=1", "monitor.bank=100"]
    arguments += ["figures.map_images=5", "monitor.queries=50"]
    arguments += [f"output_dir={tmp_path}", f"cache_dir={cache_dir}", "eval.seeds=1", FAST]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *arguments, "train.max_steps=1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics, after_round = tmp_path / "latest" / "metrics.jsonl", {}
    try:
        while process.poll() is None:
            rounds = len(metrics.read_text().splitlines()) if metrics.exists() else 0
            if rounds and rounds not in after_round:
                after_round[rounds] = own_memory(process.pid)
            time.sleep(0.1)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, process.stderr.read()
    assert len(after_round) >= 7
    early, late = after_round[3], after_round[max(k for k in after_round if k < 8)]
    assert early > 0
    assert late < early * 1.05, after_round


def test_a_nameless_table_of_one_class_goes_the_whole_way(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 9, 9)).tolist()
    (tmp_path / "table").mkdir()
    rows = pa.table({"image": images, "label": [3] * 20})
    pq.write_table(rows, tmp_path / "table" / "train.parquet")
    given = ["dataset=hub", f"dataset.path={tmp_path}/table", "dataset.test_split=null", FAST]
    places = [f"output_dir={tmp_path}/outputs", f"cache_dir={tmp_path}/cache"]
    size = ["dataset.image_size=8", "--num_rounds=1", "train.max_steps=1", "train.batch_size=4"]
    done = start("main.py", *SMALL, *given, *places, *size)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "local, 16 images of 8 x 8 pixels" in done.stdout
    assert "One class alone, so no linear evaluation." in done.stdout
    assert done.stderr == ""
    run = tmp_path / "outputs" / "latest"
    with safe_open(run / "encoder.safetensors", "pt") as file:
        assert file.metadata()["dataset"] == "local"
    again = start("test.py", f"run={run}", "label_fraction=0.5", f"cache_dir={tmp_path}/cache")
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "all of one class" in again.stderr


def test_test_py_says_when_the_images_are_no_longer_those_of_the_training(finished, cache_dir):
    output, _ = finished
    run, file = output / "latest", f"{output}/latest/config.yaml"
    config = Path(file).read_text()
    quick = [f"run={run}", "epochs=1", "seeds=1", f"cache_dir={cache_dir}", "baselines=false"]
    before = start("test.py", *quick)
    try:
        Path(file).write_text(config.replace("seed: 0", "seed: 7", 1))  # another test split
        after = start("test.py", *quick)
    finally:
        Path(file).write_text(config)
    assert (before.returncode, after.returncode) == (0, 0), after.stderr
    words = "warning: the images differ from those that the run was trained on"
    assert words not in before.stdout + before.stderr
    assert (after.stdout + after.stderr).count(words) == 1


# --- bad input ----------------------------------------------------------------


def enter(monkeypatch, capsys, name, check, arguments):
    """Run an entry point in this process up to its job; return its status and messages."""

    def job(config):
        raise AssertionError("work started")

    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        run_entry(name, check, job, with_earlier_overrides if name == "config" else list)
    return exit_.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dataset=cifr10"], "did you mean cifar10?"),
        (["model=resnet34"], "unknown model"),
        (["--strategy", "krumm"], "did you mean krum?"),
        (["--num_client=3"], "did you mean num_clients?"),
        (["--num_clients=0"], "at least 1"),
        (["--num_clients", "-2"], "at least 1"),
        (["--num_clients=700"], "too few to train on 2"),
        (["--num_clients=5000"], "can't deal 1437 images out to 5000 clients"),
        (["eval.label_fraction=0"], "above 0"),
        (["eval.label_fraction=1.5"], "at most 1"),
        (["eval.label_fraction=0.002"], "too few labels"),
        (["dataset=cifar10", "dataset.path=/none"], "no such folder"),
        (["dataset=imagefolder"], "add dataset.path=DIR"),
        (["dataset=hub"], "add dataset.name=OWNER/NAME"),
        (["--num_cpus=1000"], "num_cpus=1000: this machine has"),
        (["strategy=fedtrimmedavg", "strategy.beta=0.7"], "below 0.5"),
        (["partition=pathological", "partition.classes_per_client=11"], "from 1 to 10"),
        (["--num_rounds"], "--num_rounds needs a value"),
        (["--multirun", "num_clients=2,0"], "num_clients=0"),
        (["method=moco", "method.queue_size=999"], "partition 0 has only 259 images to train on"),
        (["receive=fedu"], "SimCLR has no predictors"),
        (["run=latest"], "is for flower-server-app; python test.py eval=federated"),
        (["output_dir=/dev/null/x"], "can't be written"),
        (["cache_dir=/dev/null/x"], "can't be written"),
        (["--min_results=6"], "there are only num_clients=5"),
        (["--participants=[5]"], "the partitions are 0 to 4"),
        (["--max_update_ratio=0.5"], "at least 1"),
        (["resume=/nowhere"], "no run at /nowhere"),
        (["--multirun", "resume=/nowhere", "seed=1,2"], "goes on with one run"),
    ],
)
def test_bad_input_gets_one_line_and_status_2(monkeypatch, capsys, cache_dir, arguments, message):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    places = [] if any("_dir" in a for a in arguments) else [f"cache_dir={cache_dir}"]
    status, error = enter(monkeypatch, capsys, "config", program.prepare, places + arguments)
    assert status == 2
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused(monkeypatch, capsys):
    arguments = ["--num_gpus=0.25"]
    status, error = enter(monkeypatch, capsys, "config", program.prepare, arguments)
    assert (status, error.count("\n")) == (2, 1)
    assert "finds no GPU" in error


@pytest.mark.parametrize("content", ["empty", "no image", "only broken"])
def test_a_useless_folder_gets_one_line(monkeypatch, capsys, tmp_path, content):
    if content == "no image":
        (tmp_path / "notes.txt").touch()
    if content == "only broken":
        (tmp_path / "a.jpg").write_text("no")
    arguments = ["dataset=imagefolder", f"dataset.path={tmp_path}", f"cache_dir={tmp_path}/../c"]
    status, error = enter(monkeypatch, capsys, "config", program.prepare, arguments)
    assert (status, error.count("\n")) == (2, 1)
    assert str(tmp_path) in error


@pytest.mark.parametrize("damage", ["missing", "truncated", "other"])
def test_a_useless_checkpoint_gets_one_line(finished, monkeypatch, capsys, tmp_path, damage):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    source = (finished[0] / "latest").resolve()
    (run / "config.yaml").write_bytes((source / "config.yaml").read_bytes())
    file = run / "checkpoints" / "round-0002.safetensors"
    if damage != "missing":
        for copied in (file, file.with_suffix(".json")):
            copied.write_bytes((source / "checkpoints" / copied.name).read_bytes())
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:1000])
    if damage == "other":
        text = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(text.replace("resnet18", "resnet50"))
    arguments = [f"checkpoint={file}"]
    status, error = enter(monkeypatch, capsys, "test", evaluation.prepare, arguments)
    assert (status, error.count("\n")) == (2, 1)
    assert str(file) in error


def test_the_line_is_all_that_a_user_sees(tmp_path):
    began = time.perf_counter()
    done = start("main.py", "--num_clients=0", f"output_dir={tmp_path}/out")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: num_clients=0: must be at least 1\n"
    assert time.perf_counter() - began < 60
    assert list(tmp_path.iterdir()) == []


def test_hydras_own_flags_still_work():
    shown = start("main.py", "--cfg", "job", "--num_clients=3")
    assert shown.returncode == 0
    assert "num_clients: 3" in shown.stdout


@pytest.mark.slow
def test_a_terminal_shows_the_clients_of_a_round_and_bold_is_the_headline_alone(
    tmp_path, cache_dir
):
    command = [sys.executable, ROOT / "main.py", *SMALL, "num_rounds=1", FAST, "eval.seeds=1"]
    places = [f"output_dir={tmp_path}", f"cache_dir={cache_dir}"]
    status, text = in_terminal([*command, *places])
    assert status == 0, text
    assert re.search(
        r"round 1/1 \|.*\| [12]/2 clients trained, [\d,]+ images/s, \d\d:\d\d left", text
    )
    drawn = re.sub(r"\x1b\[[?\d;]*\w", "", text).replace(str(tmp_path), "")
    assert max(map(len, re.split(r"[\r\n]", drawn))) <= 80
    bold = [line for line in text.splitlines() if "\x1b[1m" in line]
    assert len(bold) == 1
    assert "federated SimCLR" in bold[0]
    assert re.sub(r"\x1b\[1m.*?\x1b\[0m", "", bold[0]).strip() == ""
    last = screen(text)
    assert any(line.startswith("      1/1 ") for line in last)
    assert not any("clients" in line and "|" in line for line in last)  # the bar is gone
    assert not any("so far" in line for line in last)
    for noise in ("WARN", "INFO", "Deprecat"):
        assert noise not in text


@pytest.mark.slow
def test_a_sweep_becomes_a_table_and_a_plot(tmp_path, cache_dir):
    places = [f"output_dir={tmp_path}/runs", f"cache_dir={cache_dir}", FAST, "eval.seeds=1"]
    places += ["figures.map_images=5"]
    sweep = ["--multirun", "num_clients=2,3", "num_rounds=1", "train.max_steps=1", "num_cpus=1"]
    done = start("main.py", *sweep, *places, "train.local_epochs=1")
    assert done.returncode == 0, done.stdout + done.stderr
    gathered = start("-m scripts.compare", tmp_path / "runs", f"--out={tmp_path}/clients")
    assert gathered.returncode == 0, gathered.stderr
    lines = (tmp_path / "clients.md").read_text().splitlines()
    assert lines[0].startswith("| num_clients | runs | linear head, 10 % |")
    assert [line.split(" | ")[:2] for line in lines[2:]] == [["| 2", "1"], ["| 3", "1"]]
    assert matplotlib.image.imread(tmp_path / "clients.png").ndim == 3
