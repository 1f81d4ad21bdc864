"""Kill runs at random moments, resume them, and compare with one that was never touched.

    python -m benchmarks.robustness.kills --kills 50 --out results/kills.json

Each trial starts the same small run on digits, sends SIGKILL to its main process
at a random moment of a phase of the run (the start, one of the rounds, the
evaluation at the end; each as likely as the others, which time alone would not
give: the start takes longer than all rounds), and resumes it. Counted are completed
rounds that were lost, ends whose final weights, encoder, metrics (but for
durations and connections) or evaluation differ from the untouched run's, and processes that
outlived their main process by more than 90 s.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from fedssl.env import ROOT
from fedssl.runs.provenance import provenance

RUN = ["num_clients=2", "num_rounds=5", "num_cpus=1", "precision=float32", "model.stem=imagenet"]
RUN += ["train.local_epochs=1", "train.max_steps=2", "monitor.bank=200", "monitor.queries=100"]
RUN += ["eval.seeds=1", "eval.epochs=2", "figures.map_images=5", "strategy=fedadam"]
DURATIONS = ("seconds", "images_per_second")
CONNECTIONS = "nodes"  # who joined in a round: all of them again after the start of a process
ORPHAN_AFTER_S = 90.0  # Ray's own agents notice after about a minute


def start(output: Path, mark: str, *arguments: str) -> subprocess.Popen:
    """Start main.py; MARK in its environment finds its descendants again."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), f"output_dir={output}", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"KILLS_MARK": mark},
        start_new_session=True,
    )


def descendants(mark: str) -> list[int]:
    """List the processes that carry a mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"KILLS_MARK={mark}".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def await_end(mark: str) -> int:
    """Wait until all marked processes are gone; kill those that stay, and count them."""
    deadline = time.monotonic() + ORPHAN_AFTER_S
    while left := descendants(mark):
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            return len(left)
        time.sleep(0.2)
    return 0


def outcome(run: Path) -> dict[str, Any]:
    """Collect what must not depend on interruptions."""
    last = max((run / "checkpoints").glob("round-*.safetensors"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    results = json.loads((run / "results.json").read_text())
    encoder = load_file(run / "encoder.safetensors")
    return {
        "weights": last.name.encode() + last.read_bytes(),
        "encoder": {k: v.numpy().tobytes() for k, v in encoder.items()},
        "metrics": without_durations(rows),
        "evaluation": [result["rows"] for result in results],
    }


def without_durations(value: Any) -> Any:
    """Drop what a clock measured, and who connected."""
    if isinstance(value, list):
        return [without_durations(item) for item in value]
    if isinstance(value, dict):
        return {
            key: without_durations(item)
            for key, item in value.items()
            if not key.startswith(DURATIONS) and key != CONNECTIONS
        }
    return value


def count_rounds(run: Path) -> int:
    """Count the rounds that are in the metrics."""
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def follow(process: subprocess.Popen, output: Path) -> list[float]:
    """Wait for the end of a run; give the durations of its phases in seconds.

    These are from its directory's appearance to the end of the first round, each
    further round, and the rest.
    """
    while not (output / "latest").exists():
        if process.poll() is not None:
            raise SystemExit(process.communicate()[0])
        time.sleep(0.02)
    ends = [time.monotonic()]
    while process.poll() is None:
        done = count_rounds(output / "latest")
        ends += [time.monotonic()] * (done + 1 - len(ends))
        time.sleep(0.02)
    ends.append(time.monotonic())
    text, _ = process.communicate()
    if process.returncode:
        raise SystemExit(text)
    return [after - before for before, after in pairwise(ends)]


def try_once(
    folder: Path, expected: dict[str, Any], phase: int, delay_s: float, number: int
) -> dict:
    """Kill a run some seconds after so many rounds, resume it, and compare."""
    output, mark = folder / f"run{number}", f"kills-{os.getpid()}"
    output.mkdir()
    process = start(output, mark, *RUN, f"cache_dir={folder}/cache")
    while not (output / "latest").exists():
        time.sleep(0.02)
    while process.poll() is None and count_rounds(output / "latest") < phase:
        time.sleep(0.01)
    time.sleep(delay_s)
    finished = process.poll() is not None
    if not finished:
        process.kill()
    process.communicate()
    run = (output / "latest").resolve()
    before = count_rounds(run)
    trial: dict[str, Any] = {"after_round": phase, "and_seconds": round(delay_s, 2)}
    trial["rounds_before"] = before
    if (run / "results.json").exists():  # all is done, whether the process was still there or not
        return trial | {"finished_before": True, "differs": compare(outcome(run), expected)}
    resumed = start(output, mark, "resume=latest")
    text, _ = resumed.communicate(timeout=300)
    if resumed.returncode:
        return trial | {"failed": text[-2000:], "differs": ["no end"]}
    found = re.search(r"going on with .* after round (\d+)", text)
    return trial | {
        "lost_rounds": max(0, before - int(found[1] if found else 0)),
        "differs": compare(outcome(run), expected),
    }


def compare(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Name what differs from the untouched run."""
    return [name for name, value in expected.items() if found[name] != value]


def run_trials(
    folder: Path,
    kills: int,
    seed: int,
    at_once: int = 1,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Run the untouched run and the trials, some at once; count what went wrong.

    Args:
        keep: told of the result so far after every few trials.
    """
    output = folder / "untouched"
    output.mkdir()
    process = start(output, "untouched", *RUN, f"cache_dir={folder}/cache")
    durations = follow(process, output)
    expected = outcome((output / "latest").resolve())
    draw = random.Random(seed)
    trials = []
    while (left := kills - sum(not trial.get("finished_before") for trial in trials)) > 0:
        numbers = range(len(trials), len(trials) + min(left, at_once))
        phases = [draw.randrange(len(durations)) for _ in numbers]
        delays = [draw.uniform(0, durations[phase]) for phase in phases]
        with ThreadPoolExecutor(at_once) as pool:
            found = list(pool.map(partial(try_once, folder, expected), phases, delays, numbers))
        for number in numbers:  # half a gigabyte each
            shutil.rmtree(folder / f"run{number}", ignore_errors=True)
        trials += found
        print("\n".join(map(json.dumps, found)), flush=True)
        keep(summary(trials, durations))
    return summary(trials, durations)


def summary(trials: list[dict[str, Any]], durations: list[float]) -> dict[str, Any]:
    """Count what went wrong."""
    killed = [trial for trial in trials if not trial.get("finished_before")]
    return {
        "kills": len(killed),
        "resumed": sum("failed" not in trial for trial in killed),
        "lost_rounds": sum(trial.get("lost_rounds", 0) for trial in killed),
        "identical_ends": sum(not trial["differs"] for trial in killed),
        "phases_s": [round(duration, 2) for duration in durations],
        "trials": trials,
    }


def main() -> None:
    """Run, print, and write everything with its provenance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--at-once", type=int, default=1, help="trials side by side")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    command = f"python -m benchmarks.robustness.kills --kills {given.kills} --seed {given.seed}"
    facts = {"command": command, "measured": provenance()}

    def keep(result: dict[str, Any]) -> None:
        if given.out:
            given.out.write_text(json.dumps(facts | result, indent=2) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        result = run_trials(Path(folder), given.kills, given.seed, given.at_once, keep)
        result["orphans"] = await_end(f"kills-{os.getpid()}")
    keep(result)
    print(json.dumps({k: v for k, v in result.items() if k != "trials"}, indent=2))


if __name__ == "__main__":
    main()
