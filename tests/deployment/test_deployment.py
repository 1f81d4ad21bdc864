"""The app as a real federation: SuperLink, SuperNodes and runs are processes on loopback.

Their logs lie in the test's temporary folder, which pytest keeps when a test
fails; the message of a failure shows the end of them.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, create_run
from PIL import Image
from sklearn.datasets import load_digits

from benchmarks.accuracy.sites import in_one_place
from benchmarks.performance.simulation import descendants
from fedssl.compute import Backend
from fedssl.config.compose import load_config
from fedssl.data.cache import open_image_set
from fedssl.data.sources.folder import labelled_folder
from fedssl.deployment.checks import free_port
from fedssl.evaluation.features import extract_features
from fedssl.runs.checkpoints import Checkpoint, save_checkpoint
from fedssl.runs.encoder_file import CLASSIFIER_FILE, load_encoder
from fedssl.runs.metrics import RoundMetrics
from fedssl.sites.site import Site
from fedssl.sites.sums import Head
from utils import build_method

BIN = Path(sys.executable).parent
TINY = ["train.local_epochs=1", "train.max_steps=2", "monitor.bank=100", "monitor.queries=50"]
TINY += ["precision=float32", "num_cpus=1", "model.stem=imagenet"]


class Place:
    """Processes of one federation, with a home, an output folder and logs of their own."""

    def __init__(self, folder):
        self.folder, self.port, self.started = folder, free_port(), {}
        self.outputs, self.home = folder / "outputs", folder / "home"
        self.home.mkdir()
        self.env = os.environ | {
            "HOME": str(self.home),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONUNBUFFERED": "1",
            "RAY_ADDRESS": "local",  # `flwr run` would join the cluster of another test
        }
        self.env.pop("FLWR_HOME", None)
        self.link = f"127.0.0.1:{self.port}"

    def start(self, name, *command):
        """Start a process whose output goes to NAME.log, in a group of its own."""
        with (self.folder / f"{name}.log").open("a") as log:
            self.started[name] = subprocess.Popen(
                command, cwd=ROOT, env=self.env, stdout=log, stderr=log, start_new_session=True
            )
        return self.started[name]

    def superlink(self, *arguments):
        given = arguments or ("--insecure",)
        self.start("superlink", "flower-superlink", *given, "--port", str(self.port))
        self.wait_for("superlink", "Uvicorn running", 120)

    def client(self, number, *arguments):
        to = ("--superlink", self.link, "--insecure", "--max-wait-time", "5")
        self.start(f"client{number}", "flower-client-app", f"app:client{number}", *to, *arguments)

    def server(self, *overrides, name="server"):
        to = ("--superlink", self.link, "--insecure", "--max-wait-time", "5")
        places = (f"output_dir={self.outputs}", f"cache_dir={self.folder}/cache")
        given = ("app:server", *to, *places, *TINY, *overrides)
        return self.start(name, "flower-server-app", *given)

    def log(self, name):
        return (self.folder / f"{name}.log").read_text()

    def all_logs(self):
        ends = (f"== {file}\n{file.read_text()[-1500:]}" for file in self.folder.glob("*.log"))
        return "\n".join(ends)

    def wait_for(self, name, text, timeout_s):
        """Wait until a log holds a text."""
        deadline = time.monotonic() + timeout_s
        while text not in self.log(name):
            gone = self.started[name].poll() is not None and text not in self.log(name)
            assert not gone, f"{name} ended without {text!r}\n{self.all_logs()}"
            assert time.monotonic() < deadline, f"no {text!r} in {name}\n{self.all_logs()}"
            time.sleep(0.2)

    def end(self, name, timeout_s):
        """Wait for the end of a process; give its status."""
        try:
            return self.started[name].wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{name} still runs after {timeout_s} s\n{self.all_logs()}")

    def run(self, *command):
        """Run a command to its end."""
        done = subprocess.run(command, cwd=ROOT, env=self.env, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    def rounds(self):
        """Read the metrics of the newest run."""
        return [json.loads(line) for line in (self.outputs / "latest/metrics.jsonl").open()]

    def kill(self, name):
        """Kill a process and its children without a chance to say goodbye."""
        launcher = self.started[name]
        for pid in [*descendants(launcher.pid), launcher.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        launcher.wait()

    def stop_all(self):
        for process in reversed(self.started.values()):
            if process.poll() is None:
                process.terminate()
        for process in self.started.values():
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        # A ServerApp without its SuperLink ends after Flower's back-off: each of its three
        # threads waits up to 20 s, one after the other, and then 5 s for a graceful end.
        deadline = time.monotonic() + 75
        while left := self.left_over():
            if time.monotonic() > deadline:
                pytest.fail(f"still running: {left}")
            time.sleep(0.5)

    def left_over(self):
        """List Flower processes that carry this place's home."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                ours = f"HOME={self.home}".encode() in (entry / "environ").read_bytes()
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if ours and ("flower" in command or "flwr" in command):
                found.append(command[:200])
        return found


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path)
    yield made
    made.stop_all()


def test_the_four_commands_give_the_numbers_of_the_simulation(place):
    rounds = ["num_rounds=1", "num_clients=2"]
    place.superlink()
    place.client(1)
    place.client(2)
    place.server(*rounds)
    assert place.end("server", 180) == 0, place.all_logs()
    assert "everything is in" in place.log("server")
    federated, run = place.rounds(), (place.outputs / "latest").resolve()
    names = {file.name for file in run.iterdir() if not file.name.startswith(("events.", "."))}
    assert names == {
        *("checkpoints", "config.yaml", "encoder.safetensors", "loss_graph.png"),
        *("metrics.jsonl", "overrides.yaml"),
    }
    assert not (place.home / ".flwr" / "config.toml").exists()  # the user's configuration
    place.stop_all()

    places = [f"output_dir={place.folder}/simulated", f"cache_dir={place.folder}/cache"]
    quick = ["eval.seeds=1", "eval.epochs=1"]
    main = [sys.executable, "main.py", *places, *quick, *TINY, *rounds]
    status, output = place.run(*main)
    assert status == 0, output
    file = place.folder / "simulated/latest/metrics.jsonl"
    for ours, theirs in zip(federated, map(json.loads, file.open()), strict=True):
        for key in ("train_loss", "eval_loss", "knn"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key
        assert ours["failures"] == []
        for client, other in zip(ours["clients"], theirs["clients"], strict=True):
            assert client["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)


def save_digits(folder, classes, rows):
    """Save digits of some classes in class folders: those of some rows, by train and test."""
    images, labels = load_digits(return_X_y=True)
    for split, chosen in rows.items():
        for row in chosen[np.isin(labels[chosen], classes)]:
            home = folder / split / f"digit {labels[row]}"
            home.mkdir(parents=True, exist_ok=True)
            pixels = (images[row].reshape(8, 8) * 15.9).astype(np.uint8)
            Image.fromarray(pixels).save(home / f"{row}.png")
    return folder


@pytest.mark.slow
def test_labels_stay_in_the_class_folders_of_two_nodes(place):
    """The sites share some classes only; all of it equals what one place would give."""
    order = np.random.default_rng(0).permutation(1797)
    west = save_digits(
        place.folder / "west", range(7), {"train": order[:200], "test": order[200:300]}
    )
    east = save_digits(
        place.folder / "east", range(3, 10), {"train": order[300:500], "test": order[500:600]}
    )
    photos = save_digits(place.folder / "photos", range(10), {"": order[600:700]})
    given = ["num_rounds=1", "num_clients=2", "dataset=imagefolder", "dataset.image_size=8"]
    config = load_config("config", [*TINY, *given, f"cache_dir={place.folder}/cache"])
    run = create_run(place.outputs / "run", config)
    state = build_method(config, torch.device("cpu")).state_dict()
    save_checkpoint(run.checkpoints, Checkpoint(1, state, metrics=RoundMetrics(1)), keep=1)
    place.superlink()
    place.client(1, "--node-config", f'partition-id=0 data-path="{west}"')
    folders = f'data-path="{photos}" labels-path="{east}"'
    place.client(2, "--node-config", f"partition-id=1 {folders}")
    given += [f"run={run.path}", "eval.seeds=1", "eval.epochs=1", "eval.baselines=false"]
    given.append("eval.label_fraction=1")
    place.server(*given, "eval=federated", name="evaluation")
    assert place.end("evaluation", 300) == 0, place.all_logs()
    assert "federated SimCLR, head from sums: " in place.log("evaluation")

    opened = [
        open_image_set(labelled_folder(str(site), None), 8, str(place.folder / "cache"), 0)
        for site in (west, east)
    ]
    kept = load_encoder(run.path / CLASSIFIER_FILE)
    names = list(kept.classifier.classes)
    assert names == [f"digit {number}" for number in range(10)]
    backend = Backend(torch.device("cpu"), torch.float32)
    features, labels, tests, truth = [], [], [], []
    for images in opened:
        numbers = np.array([names.index(name) for name in images.class_names])
        for split, pixels, found in (
            (images.train, features, labels),
            (images.test, tests, truth),
        ):
            pixels.append(extract_features(kept.encoder, split.pixels, backend, 256, 8))
            found.append(numbers[split.labels])
    bank, test = np.concatenate(features), np.concatenate(tests)
    (result,) = run.read_results()
    row = result["rows"][0]
    assert result["test_images"] == len(test)
    predicted = kept.classifier.probabilities(torch.from_numpy(test)).argmax(dim=1).numpy()
    right = int((predicted == np.concatenate(truth)).sum())
    assert abs(right - row["mean"] * len(test)) <= 1  # the central score, but for one image
    weight, bias = kept.classifier.weight.numpy().T, kept.classifier.bias.numpy()
    one_place = Site(bank, np.concatenate(labels), test, np.concatenate(truth), 10)
    assert in_one_place({0: one_place}, Head(weight, bias), test) >= 0.999

    tuning = ["eval=federated_finetune", "eval.rounds=1"]
    place.server(*given, *tuning, name="tuning")
    assert place.end("tuning", 300) == 0, place.all_logs()
    assert "federated SimCLR, fine-tuned by rounds: " in place.log("tuning")
    tuned = run.read_results()[1]["rows"]
    assert tuned[2]["mean"] == row["mean"]  # the head from sums on the encoder as it was
    assert np.sum(tuned[0]["sites"][0]["confusion"]) == len(test)


@pytest.mark.slow
def test_flwr_run_simulates(place):
    """`flwr run .` starts a SuperLink of its own, which Flower leaves running."""
    overrides = [*TINY, "num_rounds=1", f"output_dir={place.outputs}"]
    overrides += [f"cache_dir={place.folder}/cache"]
    try:
        status, output = place.run(
            *("flwr", "run", ".", "--stream", "--federation-config", "num-supernodes=2"),
            *("--run-config", f'hydra-overrides="{" ".join(overrides)}"'),
        )
        assert status == 0, output
        assert (place.outputs / "latest" / "metrics.jsonl").is_file(), output
        assert len(place.rounds()[0]["clients"]) == 2
        assert (place.outputs / "latest" / "encoder.safetensors").is_file()
    finally:
        subprocess.run(["pkill", "-f", f"{place.home}/.flwr/local-superlink"])


GONE = "its node is gone, no heartbeat any more"


@pytest.mark.slow
def test_a_node_that_dies_is_left_out_and_taken_back(place):
    """In a run that Flower's own command starts."""
    place.superlink()
    place.client(1)
    place.client(2)
    (place.home / ".flwr").mkdir(exist_ok=True)
    (place.home / ".flwr" / "config.toml").write_text(
        f'[superlink.two-sites]\naddress = "{place.link}"\ninsecure = true\n'
    )
    overrides = [*TINY, "round_timeout_s=180", "min_nodes=1", "num_clients=2", "num_rounds=3"]
    overrides += [f"output_dir={place.outputs}", f"cache_dir={place.folder}/cache"]
    overrides += ["method=byol", "receive=fedema"]
    run_config = f'hydra-overrides="{" ".join(overrides)}"'
    place.start("server", "flwr", "run", ".", "two-sites", "--stream", "--run-config", run_config)
    place.wait_for("server", "configure_train", 240)
    place.kill("client2")
    place.client(2)
    place.wait_for("server", f"without client 1: {GONE}", 240)
    # Without a key of its own it gets its partition once its old heartbeat is missing.
    place.wait_for("server", "partition 1 is connected again", 240)
    assert place.end("server", 400) == 0, place.all_logs()
    kept = list((place.folder / "cache" / "clients").glob("*/partition-*/round-*"))
    assert len({file.parent for file in kept}) == 2  # of one run, each node's own
    first, *_, last = place.rounds()
    (failure,) = first["failures"]
    assert (failure["partition"], failure["reason"]) == (1, GONE)
    assert [client["partition"] for client in first["clients"]] == [0]
    assert 1 in [client["partition"] for client in last["clients"]]
    assert 1 not in [failure["partition"] for failure in last["failures"]]


@pytest.mark.slow
def test_a_node_that_never_comes_and_a_superlink_that_is_stopped(place):
    place.superlink()
    place.client(1)
    place.server("node_wait_s=4")
    assert place.end("server", 60) == 1
    last = place.log("server").splitlines()[-1]
    assert "1 of 2 nodes are connected after waiting 4 s" in last
    assert "Traceback" not in place.log("server")

    place.server(name="again")
    place.wait_for("again", "1 of 2 nodes are connected; waiting", 240)
    place.started["superlink"].terminate()
    for name in ("again", "client1"):
        assert place.end(name, 40) == 1
        assert "failed: " in place.log(name).splitlines()[-1], place.log(name)
    assert "has been gone for 5 s" in place.log("client1").splitlines()[-1]


BAD_INPUT = {
    "unknown client": (["client", "app:client9"], "did you mean app:client"),
    "unknown module": (["client", "nowhere:client1"], "in the module 'app'"),
    "the other kind": (["client", "app:server"], "known: client, client1, client2"),
    "no attribute": (["client", "app"], "must be module:attribute"),
    "a client as server": (["server", "app:client1"], "known: server"),
    "no SuperLink": (["server", "app:server"], "no SuperLink at"),
    "no SuperLink for a node": (["client", "app:client1", "--max-wait-time=1"], "no SuperLink at"),
    "a wrong address": (["client", "app:client1", "--superlink=here"], "must be HOST:PORT"),
    "a missing certificate": (["client", "app:client1", "--root-certificates=no.crt"], "no such"),
    "a missing folder": (
        ["client", "app:client1", "--node-config", 'data-path="/nowhere"'],
        "data-path=/nowhere: is no folder",
    ),
    "an unknown node key": (
        ["client", "app:client1", "--node-config", "partition=0"],
        "partition: unknown key; known: partition-id",
    ),
    "an unknown run key": (["server", "app:server", "--run-config", "rounds=3"], "rounds: unknown"),
    "a wrong override": (["server", "app:server", "num_round=3"], "did you mean num_rounds?"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
@pytest.mark.slow
def test_bad_input_gets_one_line(case, place):
    (kind, *arguments), message = BAD_INPUT[case]
    link = (
        [] if any(a.startswith("--superlink") for a in arguments) else ["--superlink", place.link]
    )
    secure = [] if any("certificates" in a for a in arguments) else ["--insecure"]
    status, output = place.run(f"flower-{kind}-app", *arguments, *link, *secure)
    assert status != 0
    assert message in output.splitlines()[-1]
    assert "Traceback" not in output


@pytest.mark.slow
def test_an_empty_folder_and_a_port_in_use_get_one_line(place):
    empty = place.folder / "empty"
    empty.mkdir()
    node = ["flower-client-app", "app:client1", "--insecure", "--superlink", place.link]
    status, output = place.run(*node, "--node-config", f'data-path="{empty}"')
    assert (status, output.count("\n")) == (2, 1)
    assert "is empty" in output
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        status, output = place.run(*node, f"--port={port}")
    assert (status, output.count("\n")) == (2, 1)
    assert f"--port={port}: Address already in use" in output
