"""What strangers and insiders try on a guarded federation, beside an honest run of three nodes.

    python -m benchmarks.robustness.attacks --out results/attacks.json

Starts the guarded SuperLink, its door (the real nginx) and three nodes with folders of
their own. While their run goes on, each attack of `door_attacks` is tried, then those on
a run, on nodes and on a simulation. Every attack is listed with what was expected and
what was seen.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.robustness.door_attacks import ATTACKS, Attack, changed_copy, removed_node
from benchmarks.robustness.guarded_federation import NGINX, Federation
from benchmarks.robustness.kills import descendants
from fedssl.env import ROOT
from fedssl.runs.provenance import provenance

MEMBERS = ("node1", "node2", "node3", "node4")
ROUNDS = 8
TINY = ["train.local_epochs=1", "train.max_steps=2", "precision=float32", "num_cpus=1"]
RUN = ["dataset=imagefolder", "dataset.image_size=32", "num_clients=3", *TINY]
EXECUTED = "executed"  # a file that only an attack leaves
OVERRIDES = (
    "+partition.x={{_target_: builtins.open, file: '{mark}', mode: w}}",
    "method._target_=os.system",
    "partition={{_target_: builtins.open, file: '{mark}', mode: w}}",
    "dataset._target_=builtins.open",
    "experiment={folder}/evil",
    "hydra.searchpath=[{folder}]",
    "dataset.name='${{oc.env:HOME}}'",
    "+strategy.initial={{_target_: pathlib.Path.touch, self: '{mark}'}}",
)
REACHES_LOOPBACK = {  # of a stranger on this machine: others find nobody who listens
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
}
STRANGER = """
import sys, ray
ray.init(sys.argv[1], logging_level=50)
print("ran", ray.get(ray.remote(lambda: 6 * 7).remote(), timeout=30))
"""


class HonestRun:
    """Three sites with folders of their own that train through the door."""

    def __init__(self, federation: Federation) -> None:
        self.federation, self.outputs = federation, federation.folder / "outputs"
        for number in (1, 2, 3):
            folder = write_images(federation.folder / f"site{number}", 20 + number)
            start_node(federation, f"node{number}", f"node{number}", number - 1, folder)

    def start(self) -> None:
        """Start the run on the server's machine, and wait for its first round."""
        federation, keys = self.federation, self.federation.certificates
        federation.start(
            "server",
            *("flower-server-app", "app:server", "--superlink", f"127.0.0.1:{federation.port}"),
            *("--root-certificates", f"{keys}/ca.crt", f"nodes_file={keys}/nodes.yaml"),
            *(*RUN, f"num_rounds={ROUNDS}", f"output_dir={self.outputs}"),
        )
        self.wait_for(lambda: len(self.rounds()) > 0)

    def rounds(self) -> list[dict]:
        """Read the rounds so far."""
        file = self.outputs / "latest" / "metrics.jsonl"
        return [json.loads(line) for line in file.open()] if file.exists() else []

    def refusals(self) -> list[str]:
        """List who was refused and why, as the metrics and the log have it."""
        events = [event for row in self.rounds() for event in row["nodes"]]
        told = [f"{e['name']}: {e['reason']}" for e in events if e["event"] == "refused"]
        return told + re.findall(r"node\d.* is refused: .*", self.federation.log("server"))

    def wait_for(self, holds: Callable[[], bool], timeout_s: float = 120) -> bool:
        """Wait until something holds; tell whether it does."""
        deadline = time.monotonic() + timeout_s
        while not holds():
            if time.monotonic() > deadline or self.federation.started["server"].poll() is not None:
                return holds()
            time.sleep(0.5)
        return True

    def end(self) -> str:
        """Wait for the end of the run; say how it ended and who took part in its rounds."""
        status = self.federation.started["server"].wait(600)
        rows = self.rounds()
        clients = {tuple(client["partition"] for client in row["clients"]) for row in rows}
        failures = sum(len(row["failures"]) for row in rows)
        return f"status {status}, {len(rows)} rounds, clients {clients}, {failures} failures"


def write_images(folder: Path, count: int) -> Path:
    """Write unlabelled colour images, as a site would hold them."""
    folder.mkdir()
    rng = np.random.default_rng(count)
    for number in range(count):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"image {number}.png")
    return folder


def start_node(
    federation: Federation, name: str, member: str, partition: int, folder: Path
) -> None:
    """Start a node as a member of the federation, through the door."""
    keys = federation.certificates
    federation.start(
        name,
        *("flower-client-app", "app:client", "--max-wait-time", "20"),
        *("--superlink", f"127.0.0.1:{federation.door_port}"),
        *("--root-certificates", f"{keys}/ca.crt", "--certificate", f"{keys}/{member}.pem"),
        *("--auth-supernode-private-key", f"{keys}/{member}"),
        *("--node-config", f'partition-id={partition} data-path="{folder}"'),
    )


def join(run: HonestRun, partition: int, count: int, reason: str) -> str:
    """Join as node4 in mid-run, with so many images; give the refusals that hold a reason."""
    name = f"newcomer with {count} images"
    folder = write_images(run.federation.folder / name, count)
    start_node(run.federation, name, "node4", partition, folder)

    def refusals() -> list[str]:
        return [line for line in run.refusals() if "node4" in line and reason in line]

    run.wait_for(lambda: bool(refusals()))
    run.federation.stop(name)
    return "; ".join(refusals())[:300]


def claim_partition(run: HonestRun) -> str:
    """A member claims the partition of another that is connected, in mid-run."""
    return join(run, partition=0, count=30, reason="partition")


def join_with_one_image(run: HonestRun) -> str:
    """A newcomer in mid-run who can't take part."""
    return join(run, partition=3, count=1, reason="images")


def copy_of_a_site(run: HonestRun) -> str:
    """A thief starts a node with both files of a site, which is connected."""
    start_node(run.federation, "thief", "node1", 0, run.federation.folder / "site2")
    status = run.federation.started["thief"].wait(120)
    last = run.federation.log("thief").strip().splitlines()[-1]
    return f"exit {status}: {last}"


def override_in_a_run(run: HonestRun) -> str:
    """Somebody on the server's machine passes by the command's own checks."""
    federation = run.federation
    mark = federation.folder / EXECUTED
    text = OVERRIDES[0].format(mark=mark, folder=federation.folder)
    config = f"hydra-overrides={json.dumps(json.dumps(text)[1:-1])}"
    given = ("run", ".", "inside", "--stream", "--run-config", config)
    _, output = federation.run("flwr", *given, timeout_s=300)
    reason = re.search(r"ServerApp raised an exception: (.*)", output)
    ran = " IT RAN" if mark.exists() else ""
    return f"{reason[1] if reason else output[-300:]}{ran}"


def overrides_at_a_node(run: HonestRun) -> str:
    """What a hostile server may put into a run's configuration, composed as a node does."""
    folder = run.federation.folder
    mark = folder / EXECUTED
    (folder / "evil.yaml").write_text(f"x: {{_target_: builtins.open, file: '{mark}', mode: w}}\n")
    refused = 0
    for override in OVERRIDES:
        text = override.format(mark=mark, folder=folder)
        code = "import sys, app; print(app.compose_text((sys.argv[1],)))"
        status, output = run.federation.run(sys.executable, "-c", code, text)
        refused += status != 0 and "SettingError" in output.splitlines()[-1]
    ran = " IT RAN" if mark.exists() else ""
    return f"{refused} of {len(OVERRIDES)} refused{ran}"


def changed_bundle_at_a_node(folder: Path) -> str:
    """A hostile operator lets his SuperLink take any app and submits a changed one."""
    federation = Federation(folder, ["node1"])
    copy = changed_copy(folder / "changed")
    mark = folder / EXECUTED
    with (copy / "client.py").open("a") as file:  # the operator's ServerApp imports it, too
        file.write(f"import sys\nif 'clientapp' in sys.argv[0]:\n    open({str(mark)!r}, 'w')\n")
    try:
        federation.start_superlink("--any-app")
        federation.start_door()
        start_node(federation, "node1", "node1", 0, write_images(folder / "site1", 20))
        overrides = [*RUN, "num_clients=1", "node_wait_s=20", f"output_dir={folder}/outputs"]
        config = f"hydra-overrides={json.dumps(' '.join(overrides))}"
        given = ("run", ".", "inside", "--stream", "--run-config", config)
        federation.run("flwr", *given, cwd=copy, timeout_s=300)
        told = re.findall(r"Refused run \d+: (.*)", federation.log("node1"))
        lives = federation.started["node1"].poll() is None
        said = told[0] if told else "nothing"
        return f"{said}; node lives: {lives}; ran: {mark.exists()}"
    finally:
        federation.stop_all()


def task_on_the_simulation(folder: Path) -> str:
    """A stranger who knows the port of a simulation's Ray runs a task."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    places = [f"output_dir={folder}/outputs", f"cache_dir={folder}/cache"]
    command = [sys.executable, "main.py", "num_clients=2", "num_rounds=500", *TINY, *places]
    log = (folder / "main.log").open("w")
    marked = env | {"KILLS_MARK": str(folder)}
    process = subprocess.Popen(command, cwd=ROOT, env=marked, stdout=log, stderr=log)
    try:
        metrics = folder / "outputs" / "latest" / "metrics.jsonl"
        while not metrics.exists() and process.poll() is None:
            time.sleep(0.2)
        address = _find_gcs(str(folder))
        tried = subprocess.run(
            [sys.executable, "-c", STRANGER, address],
            capture_output=True,
            text=True,
            env=env | REACHES_LOOPBACK,
            timeout=120,
        )
        before = len(metrics.read_text().splitlines())
        time.sleep(10)
        goes_on = len(metrics.read_text().splitlines()) > before
    finally:
        process.terminate()
        process.wait(60)
    reasons = re.findall("(?i)[^\n]*(?:authenticat|auth token)[^\n]*", tried.stderr)
    told = tried.stdout or (reasons or [tried.stderr])[0].strip()[:240]
    said = " ".join(told.split())
    return f"at {address}: exit {tried.returncode}, {said}; run goes on: {goes_on}"


def _find_gcs(mark: str) -> str:
    """Find the address that the command lines of a simulation's processes show to everybody."""
    for pid in descendants(mark):
        with suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            if found := re.search(r"--gcs-address=(\S+)", line):
                return found[1]
    raise RuntimeError("the simulation's Ray is not found")


BESIDE_A_RUN: tuple[tuple[str, str, Callable[[HonestRun], str]], ...] = (
    (
        "a member claims another's partition in mid-run",
        r"node4.*nodes_file gives it partition 3, it holds 0",
        claim_partition,
    ),
    (
        "a newcomer with one image in mid-run",
        r"node4.* is refused: a client has 1 images, too few",
        join_with_one_image,
    ),
    ("both files of a site, which is connected", r"^exit 1: .*refuses this node", copy_of_a_site),
    (
        "code in a run's overrides, past the command's checks",
        r"^(?!.*IT RAN).*(partition\.x|_target_)",
        override_in_a_run,
    ),
    (
        "overrides of a hostile server, at a node",
        rf"^{len(OVERRIDES)} of {len(OVERRIDES)} refused$",
        overrides_at_a_node,
    ),
)
ALONE: tuple[tuple[str, str, Callable[[Path], str]], ...] = (
    (
        "a changed bundle of the same name and version, at a node",
        r"this site installed \w+; node lives: True; ran: False$",
        changed_bundle_at_a_node,
    ),
    (
        "a task on the simulation's Ray",
        r"(?i)^at 127\.0\.0\.1:\d+: exit [1-9].*auth.*; run goes on: True$",
        task_on_the_simulation,
    ),
)


def try_all(folder: Path) -> list[dict]:
    """Try every attack; give what was seen of each, and of the honest run."""
    rows: list[dict] = []

    def note(name: str, expected: str, seen: str) -> None:
        held = re.search(expected, seen) is not None
        seen = seen.replace(str(folder), "...")
        rows.append({"attack": name, "expected": expected, "seen": seen, "held": held})
        print(f"{'ok ' if held else 'NOT'} {name}: {seen[:120]}", flush=True)

    (folder / "run").mkdir()
    federation = Federation(folder / "run", MEMBERS)
    try:
        federation.start_superlink()
        federation.start_door()
        run = HonestRun(federation)
        run.start()
        for name, expected, attempt in BESIDE_A_RUN:
            note(name, expected, attempt(run))
        last = [attack for attack in ATTACKS if attack.run is removed_node]
        for attack in ATTACKS:
            if attack not in last:
                _note_door(note, attack, federation)
        ended = run.end()
        expected = rf"^status 0, {ROUNDS} rounds, clients {{\(0, 1, 2\)}}, 0 failures$"
        note("meanwhile, the honest run of three nodes", expected, ended)
        for attack in last:
            _note_door(note, attack, federation)
    finally:
        federation.stop_all()
    for name, expected, attempt_alone in ALONE:
        place = folder / re.sub(r"\W+", "-", name)[:30]
        place.mkdir()
        note(name, expected, attempt_alone(place))
    return rows


def _note_door(note: Callable[[str, str, str], None], attack: Attack, at: Federation) -> None:
    note(attack.name, attack.expected, attack.run(at))


def main(arguments: Sequence[str] | None = None) -> None:
    """Try all attacks, print and write what was seen; end with 1 if one was not refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    if NGINX is None:
        raise SystemExit("nginx is not installed; apt-get install nginx-light")
    with tempfile.TemporaryDirectory() as folder:
        rows = try_all(Path(folder))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "command": "python -m benchmarks.robustness.attacks",
            "attacks": rows,
            "measured": provenance(),
        }
        given.out.write_text(json.dumps(result, indent=2) + "\n")
    if not all(row["held"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
