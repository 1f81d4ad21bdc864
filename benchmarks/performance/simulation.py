"""How much a whole simulation costs beyond the training itself, and what its memory does.

    python -m benchmarks.performance.simulation --path cifar10-parquet --out results/simulation.json

Runs `python main.py` on CIFAR-10 up to the trained encoder and
compares its wall time, up to the trained encoder, with the time that the clients
spent in local training, which they report themselves, divided by the number of
clients that run at a time. Meanwhile the resident and the proportional memory of
every client process is sampled; shared pages, such as those of the image cache,
count once in the latter. Of all processes together, the main one included, the
median of the anonymous memory (their own, no files) is given for every round.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from omegaconf import OmegaConf

from fedssl.compute import count_cores
from fedssl.env import ROOT
from fedssl.runs.provenance import provenance

SAMPLE_EVERY_S = 5.0  # reading smaps costs time
LOOK_EVERY_S = 0.1
PARTS = {  # of a process's memory, by the files that it maps
    "cache_rss": re.compile(r"\.pixels$"),
    "cuda_rss": re.compile("/nvidia/|cuda|cudnn|cublas|nccl"),
}


def descendants(pid: int) -> list[int]:
    """List the processes below a process, children first."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = file.read_text().split()
        except OSError:  # it has ended meanwhile
            continue
        for child in map(int, children):
            found += [*descendants(child), child]
    return found


def find_clients(main_pid: int) -> list[int]:
    """List the client processes of a simulation."""
    found = []
    for pid in descendants(main_pid):
        with suppress(OSError):
            if b"ClientAppActor" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def client_memory(main_pid: int) -> list[dict[str, float]]:
    """Sample the memory of the client processes, in MB.

    Resident, proportional, and of the resident what maps the image cache's file and the
    libraries for CUDA, which a PyTorch for CPUs alone does not have.
    """
    found = []
    for pid in find_clients(main_pid):
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            parts = dict.fromkeys(PARTS, 0)
            inside: list[str] = []
            for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
                if "-" in line.split(" ", 1)[0]:
                    inside = [name for name, file in PARTS.items() if file.search(line)]
                elif inside and line.startswith("Rss:"):
                    parts[inside[0]] += int(line.split()[1])
        except OSError:
            continue
        sizes = {line.split()[0][:-1]: int(line.split()[1]) for line in rollup.splitlines()[1:]}
        found.append(
            {"rss": sizes["Rss"] / 1e3, "pss": sizes["Pss"] / 1e3}
            | {name: size / 1e3 for name, size in parts.items()}
        )
    return found


def own_memory(main_pid: int) -> float:
    """Add up the anonymous memory of the main process and the clients', in MB.

    What they share, files and Ray's object store, would count for each of them.
    """
    total = 0
    for pid in [main_pid, *find_clients(main_pid)]:
        with suppress(OSError):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    return total / 1e3


def parts_of(
    rows: Sequence[dict[str, Any]], wall: float, training: float, startup: float
) -> dict[str, float]:
    """Divide what a simulation took beside the training, in seconds: where it went."""
    train, evaluation, knn = (
        sum(row[f"seconds_{part}"] for row in rows) for part in ("train", "evaluate", "knn")
    )
    parts = {"start": startup, "to clients and back": train - training}
    parts |= {"evaluation": evaluation, "kNN": knn}
    return parts | {"checkpoints and the end": wall - training - sum(parts.values())}


def measure(path: str, overrides: Sequence[str], ray_address: str | None = None) -> dict[str, Any]:
    """Run a simulation on CIFAR-10 and say what it took.

    Args:
        path: a local copy of uoft-cs/cifar10.
        overrides: of main.py.
        ray_address: of a cluster to use; its clients' memory is not seen.
    """
    cluster = [f"ray_address={ray_address}"] if ray_address else []
    with tempfile.TemporaryDirectory() as folder:
        command = ["main.py", "dataset=cifar10", f"dataset.path={path}", *overrides]
        places = [f"output_dir={folder}"]
        began, began_at = time.perf_counter(), time.time()
        run = subprocess.Popen([sys.executable, *command, *cluster, *places], cwd=ROOT)
        latest = Path(folder, "latest")
        metrics = latest / "metrics.jsonl"
        memory: list[dict[str, float]] = []
        own: dict[int, list[float]] = {}
        first = trained = None
        while run.poll() is None and trained is None:
            memory += client_memory(run.pid)
            done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
            own.setdefault(done + 1, []).append(own_memory(run.pid))
            if first is None and (files := sorted(latest.glob("checkpoints/round-*"))):
                first = int(files[0].stem[-4:]), files[0].stat().st_mtime - began_at
            wait_until = time.perf_counter() + SAMPLE_EVERY_S
            while trained is None and time.perf_counter() < wait_until:
                if (latest / "encoder.safetensors").exists():
                    trained = time.perf_counter() - began
                time.sleep(LOOK_EVERY_S)
        run.send_signal(signal.SIGINT)  # without the evaluation
        run.wait()
        if trained is None or first is None:
            raise SystemExit(f"the run failed with status {run.returncode}")
        rows = [json.loads(line) for line in metrics.open()]
        config = OmegaConf.load(latest / "config.yaml")
    processes = min(config.num_clients, count_cores() // config.num_cpus)
    local = [
        sum(
            client["images"] / client["images_per_second"]
            for client in row["clients"]
            if "images" in client  # others only evaluate
        )
        / processes
        for row in rows
    ]
    startup = first[1] - sum(row["seconds"] for row in rows[: first[0]])
    found = {
        "command": f"python {' '.join(command[:2])} {' '.join(overrides)}",
        "wall_s": trained,
        "startup_s": startup,
        "local_training_s": sum(local),
        "processes": processes,
        "overhead_s": trained - sum(local),
        "parts_s": parts_of(rows, trained, sum(local), startup),
        "round_overhead_s": median(
            row["seconds"] - spent
            for row, spent in list(zip(rows, local, strict=True))[min(1, len(rows) - 1) :]
        ),
        "ratio": trained / sum(local),
        "own_mb_by_round": [round(median(own[n])) for n in sorted(own) if n <= len(rows)],
    }
    if memory:
        found["peak_client_mb"] = {k: max(m[k] for m in memory) for k in memory[0]}
    return found


def main() -> None:
    """Run the simulation, compare, print, and write everything with its provenance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", required=True, help="a local copy of uoft-cs/cifar10")
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, such as train.max_steps=20")
    given = parser.parse_intermixed_args()
    measured = provenance()
    result = measure(given.path, given.overrides)
    print(json.dumps(result, indent=2))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result | {"measured": measured}, indent=2) + "\n")


if __name__ == "__main__":
    main()
