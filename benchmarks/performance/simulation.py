"""How much a whole simulation costs beyond the training itself, and what its memory does.

    python -m benchmarks.performance.simulation --path cifar10-parquet --out results/simulation.json

Runs `python main.py` on CIFAR-10 without the final evaluation's repetitions and
compares its wall time, up to the trained encoder, with the time that the clients
spent in local training, which they report themselves, divided by the number of
clients that run at a time. Meanwhile the resident and the proportional memory of
every client process is sampled; shared pages, such as those of the image cache,
count once in the latter. Of all processes together, the main one included, the
median of the anonymous memory (their own, no files) is given for every round.

    python -m benchmarks.performance.simulation --path cifar10-parquet num_clients=1000 \\
        strategy.fraction_train=0.01 strategy.fraction_evaluate=0.01 num_rounds=12
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

from omegaconf import OmegaConf

from fedssl.compute import count_cores
from fedssl.env import ROOT
from fedssl.runs.provenance import provenance

SAMPLE_EVERY_S = 5.0  # reading smaps costs time


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
    """Sample resident, proportional and cache-file memory of the client processes, in MB."""
    found = []
    for pid in find_clients(main_pid):
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            cache = 0
            inside = False
            for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
                if "-" in line.split(" ", 1)[0]:
                    inside = line.endswith(".pixels")
                elif inside and line.startswith("Rss:"):
                    cache += int(line.split()[1])
        except OSError:
            continue
        sizes = {line.split()[0][:-1]: int(line.split()[1]) for line in rollup.splitlines()[1:]}
        found.append(
            {"rss": sizes["Rss"] / 1e3, "pss": sizes["Pss"] / 1e3, "cache_rss": cache / 1e3}
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


def main() -> None:
    """Run the simulation, compare, print, and write everything with its provenance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", required=True, help="a local copy of uoft-cs/cifar10")
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, such as train.max_steps=20")
    given = parser.parse_intermixed_args()
    measured = provenance()
    with tempfile.TemporaryDirectory() as folder:
        command = ["main.py", "dataset=cifar10", f"dataset.path={given.path}", *given.overrides]
        began = time.perf_counter()
        run = subprocess.Popen(
            [sys.executable, *command, f"output_dir={folder}", "eval.seeds=1"], cwd=ROOT
        )
        metrics = Path(folder, "latest", "metrics.jsonl")
        memory: list[dict[str, float]] = []
        own: dict[int, list[float]] = {}
        trained = None
        while run.poll() is None:
            memory += client_memory(run.pid)
            done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
            own.setdefault(done + 1, []).append(own_memory(run.pid))
            if trained is None and Path(folder, "latest", "encoder.safetensors").exists():
                trained = time.perf_counter() - began
            time.sleep(SAMPLE_EVERY_S)
        if run.returncode or trained is None:
            raise SystemExit(f"the run failed with status {run.returncode}")
        rows = [json.loads(line) for line in metrics.open()]
        config = OmegaConf.load(Path(folder, "latest", "config.yaml"))
    processes = min(config.num_clients, count_cores() // config.num_cpus)
    local = sum(
        client["images"] / client["images_per_second"]
        for row in rows
        for client in row["clients"]
        if "images" in client  # others only evaluate
    )
    result = {
        "command": f"python {' '.join(command[:2])} {' '.join(given.overrides)}",
        "wall_s": trained,
        "local_training_s": local / processes,
        "processes": processes,
        "overhead_s": trained - local / processes,
        "ratio": trained / (local / processes),
        "peak_client_mb": {k: max(m[k] for m in memory) for k in ("rss", "pss", "cache_rss")},
        "own_mb_by_round": [round(median(own[n])) for n in sorted(own) if n <= len(rows)],
        "measured": measured,
    }
    print(json.dumps({k: v for k, v in result.items() if k != "measured"}, indent=2))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
