"""What a federation of processes costs beside the simulation of the same clients.

    python -m benchmarks.performance.four_commands --out results/four_commands.json

Runs the README's four commands with the defaults on this machine, with a home of their
own, then `python main.py num_clients=2`, and compares wall times and losses. The
lines that the processes print are timed as they come: they say where the time of
the start and of a message goes. Measure on an idle machine.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from fedssl.deployment.checks import free_port
from fedssl.deployment.commands import environment
from fedssl.env import ROOT
from fedssl.runs.provenance import provenance

LIMIT = 2.5  # times the simulation's wall time
SIGNS = {  # what a line of the server's command says has been done
    "run submitted": "is on its way",
    "ServerApp loaded, images open": "the run's directory is",
    "first node known": "is connected",
    "first messages sent": "configure_train",
    "first round done": "round 1:",
}
Line = tuple[float, str]


class Process:
    """A process whose lines are kept with the seconds since it was started."""

    def __init__(self, command: Sequence[str], env: dict[str, str]) -> None:
        self.began = time.perf_counter()
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self.lines: list[Line] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.lines.append((time.perf_counter() - self.began, line.rstrip()))

    def wait_for(self, text: str, timeout_s: float = 120) -> float:
        """Give the seconds until a line holds a text."""
        deadline = time.perf_counter() + timeout_s
        while time.perf_counter() < deadline:
            for seconds, line in list(self.lines):
                if text in line:
                    return seconds
            time.sleep(0.05)
        raise SystemExit(f"no {text!r}:\n" + "\n".join(line for _, line in self.lines[-30:]))

    def end(self) -> float:
        """Wait for its end; give the seconds that it took.

        Raises:
            SystemExit: it failed.
        """
        status = self.process.wait()
        seconds = time.perf_counter() - self.began
        self._reader.join(10)
        if status:
            last = "\n".join(line for _, line in self.lines[-30:])
            raise SystemExit(f"{self.process.args} ended with {status}:\n{last}")
        return seconds

    def stop(self) -> None:
        """Ask it to end, and wait."""
        self.process.terminate()
        self.process.wait(60)


def read_rounds(folder: Path) -> list[dict]:
    """Read the metrics of the newest run below a folder."""
    return [json.loads(line) for line in (folder / "latest/metrics.jsonl").open()]


def federate(folder: Path, overrides: Sequence[str]) -> dict:
    """Run the four commands; give their wall time and where it went."""
    port = free_port()
    link = ("--insecure", "--superlink", f"127.0.0.1:{port}")
    env = environment(FLWR_HOME=str(folder / "flower"))
    began = time.perf_counter()
    running = [Process(("flower-superlink", "--insecure", "--port", str(port)), env)]
    try:
        running += [Process(("flower-client-app", f"app:client{n}", *link), env) for n in (1, 2)]
        running[0].wait_for("Uvicorn running")
        output = f"output_dir={folder}/federated"
        server = Process(("flower-server-app", "app:server", *link, output, *overrides), env)
        running.append(server)
        server.end()
        wall = time.perf_counter() - began
    finally:
        for each in reversed(running):
            each.stop()
    rounds = read_rounds(folder / "federated")
    return {
        "wall_s": wall,
        "start_s": {name: server.wait_for(sign, 1) for name, sign in SIGNS.items()},
        "round_s": [row["seconds"] for row in rounds],
        "train_message_s": [_messages(node.lines) for node in running[1:3]],
        "training_s": [
            [client["images"] / client["images_per_second"] for client in row["clients"]]
            for row in rounds
        ],
        "eval_loss": [row["eval_loss"] for row in rounds],
    }


def _messages(lines: Sequence[Line]) -> list[float]:
    """Give the seconds between receiving and answering each training message of a node."""
    found, received = [], None
    for seconds, line in lines:
        if re.search(r"Receiving: train message", line):
            received = seconds
        elif re.search(r"Sending: train message", line) and received is not None:
            found.append(seconds - received)
            received = None
    return found


def simulate(folder: Path, overrides: Sequence[str]) -> dict:
    """Run the simulation of the same two clients."""
    output = f"output_dir={folder}/simulated"
    main = (sys.executable, "main.py", "num_clients=2", output, *overrides)
    wall = Process(main, dict(os.environ)).end()
    rounds = read_rounds(folder / "simulated")
    return {
        "wall_s": wall,
        "round_s": [row["seconds"] for row in rounds],
        "eval_loss": [row["eval_loss"] for row in rounds],
    }


def main() -> None:
    """Measure both, print the comparison, and write it with its provenance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, such as num_rounds=1")
    given = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        federated = federate(Path(folder), given.overrides)
        simulated = simulate(Path(folder), given.overrides)
    ratio = federated["wall_s"] / simulated["wall_s"]
    training = median(max(row) for row in federated["training_s"])
    print(f"four commands {federated['wall_s']:.0f} s, simulation {simulated['wall_s']:.0f} s")
    print(f"ratio {ratio:.2f}, at most {LIMIT}")
    print(f"rounds {federated['round_s']}, of the simulation {simulated['round_s']}")
    print(f"a round's training {training:.1f} s, its message {federated['train_message_s']}")
    for name, seconds in federated["start_s"].items():
        print(f"{seconds:7.1f} s  {name}")
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "command": "python -m benchmarks.performance.four_commands",
            "overrides": given.overrides,
            "ratio": ratio,
            "limit": LIMIT,
            "federated": federated,
            "simulated": simulated,
            "measured": provenance(),
        }
        given.out.write_text(json.dumps(result, indent=2) + "\n")
    if ratio > LIMIT:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
