"""Run what is still missing of the recorded results.

    python -m benchmarks.accuracy.sweep --list
    python -m benchmarks.accuracy.sweep --path=cifar10-parquet   # hours; can be interrupted
    python -m benchmarks.accuracy.sweep --path=cifar10-parquet --only sweep/clients-2 seed0

Every run is `python main.py` with an experiment and a few overrides, and some are
evaluated again with other numbers of labels. Their small files go to
results/NAME/seedN: configuration, metrics of every round, evaluations with commit,
versions and hardware, and the commands with their wall times. What is there already
is skipped. `python -m benchmarks.accuracy.tables` then writes the tables of docs/results.md.

With `--jobs=2` two runs share the machine, each with half of its cores. That takes less time
in all, since a run of one core has nobody to wait for; of their wall times the record says so.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from omegaconf import OmegaConf

from benchmarks.accuracy.recorded import EVALUATIONS, ONE_SEED, RUNS, SEEDS
from fedssl.env import ROOT

RESULTS = ROOT / "results"


def missing(only: Sequence[str]) -> list[tuple[str, int]]:
    """List the runs without a record, all of a seed before those of the next.

    Args:
        only: names of runs, seeds ("seed0"), or both; none for all.
    """
    names = set(only) & set(RUNS) or set(RUNS)
    seeds = [seed for seed in SEEDS if f"seed{seed}" in only] or SEEDS
    return [
        (name, seed)
        for seed in seeds
        for name in RUNS
        if name in names and (seed == 0 or name not in ONE_SEED)
        if not (RESULTS / name / f"seed{seed}" / "commands.json").exists()
    ]


def needs_path(name: str) -> bool:
    """Tell whether a run is of CIFAR-10, which does not come along as the digits do."""
    return any(override.startswith("experiment=cifar10") for override in RUNS[name])


def run_one(
    name: str, seed: int, path: str, scratch: Path, jobs: int = 1, keep: Path | None = None
) -> None:
    """Train and evaluate one run, then put its record in place as a whole.

    After an interruption it goes on with the first command that was not finished,
    unless those that were are not the same any more.

    Args:
        jobs: how many runs share the machine.
        keep: folder for the run's whole directory, its checkpoints too; None drops it.
    """
    output = scratch / name / f"seed{seed}"
    run, finished = output / "run", output / "commands.json"
    data = [f"dataset.path={path}"] if needs_path(name) else []
    places = [*data, f"output_dir={output}", f"run_dir={run}"]
    steps = [(["main.py", *RUNS[name], f"seed={seed}"], places)]
    steps += [(["test.py", *more], [f"run={run}"]) for more in EVALUATIONS.get(name, [])]
    lines = [" ".join(["python", *command]) for command, _ in steps]
    told = json.loads(finished.read_text()) if finished.exists() else []
    if not told or [done["command"] for done in told] != lines[: len(told)]:
        told = []
        shutil.rmtree(output, ignore_errors=True)
    for (command, where), line in list(zip(steps, lines, strict=True))[len(told) :]:
        wall = time_command([*command, *where])
        shared = {"runs_at_a_time": jobs} if jobs > 1 else {}
        told.append({"command": line, "wall_s": round(wall, 1), **shared})
        finished.write_text(json.dumps(told, indent=2) + "\n")
    keep_record(run, RESULTS / name / f"seed{seed}", told)
    if keep:
        shutil.copytree(run, keep / name / f"seed{seed}", dirs_exist_ok=True)
    shutil.rmtree(output)


def time_command(command: Sequence[str]) -> float:
    """Run a program of the project and give its wall time in seconds."""
    print(f"python {' '.join(command)}", flush=True)
    began = time.perf_counter()
    if subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
        raise SystemExit(f"failed: python {' '.join(command)}")
    return time.perf_counter() - began


def keep_record(run: Path, record: Path, commands: list[dict]) -> None:
    """Copy the small files of a run, without the places of this machine."""
    partial = record.with_name(f".{record.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = OmegaConf.load(run / "config.yaml")
    config.dataset.path = None
    for key in ("output_dir", "run_dir", "cache_dir"):
        del config[key]
    OmegaConf.save(config, partial / "config.yaml")
    for name in ("metrics.jsonl", "results.json"):
        shutil.copy(run / name, partial)
    (partial / "commands.json").write_text(json.dumps(commands, indent=2) + "\n")
    shutil.rmtree(record, ignore_errors=True)
    partial.rename(record)


def share_cores(jobs: int) -> Iterator[set[int]]:
    """Deal the cores of this machine out to so many runs, evenly; what remains stays idle."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // jobs)
    return (set(cores[place * share : (place + 1) * share] or cores) for place in range(jobs))


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", help="a local copy of uoft-cs/cifar10")
    parser.add_argument("--only", nargs="*", default=[], help="names of runs, seedN, or both")
    parser.add_argument("--list", action="store_true", help="only tell what is missing")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on its cores")
    parser.add_argument("--keep", type=Path, help="keep whole runs, with checkpoints, below this")
    parser.add_argument("--scratch", type=Path, default=ROOT / "outputs" / "sweep")
    given = parser.parse_args()
    known = {*RUNS, *(f"seed{seed}" for seed in SEEDS)}
    if strangers := sorted(set(given.only) - known):
        parser.error(f"--only={strangers[0]}: there are {', '.join(sorted(known))}")
    left = missing(given.only)
    print(f"{len(left)} runs are missing")
    if given.list:
        print("\n".join(f"  {name} seed{seed}: {' '.join(RUNS[name])}" for name, seed in left))
        return
    if not given.path and any(needs_path(name) for name, _ in left):
        parser.error("--path is missing: a local copy of uoft-cs/cifar10")
    path, shares = str(Path(given.path or ".").resolve()), share_cores(given.jobs)
    # The processes that a thread starts have its cores.
    pool = ThreadPoolExecutor(given.jobs, initializer=lambda: os.sched_setaffinity(0, next(shares)))
    try:
        shared = path, given.scratch, given.jobs, given.keep
        runs = [pool.submit(run_one, *run, *shared) for run in left]
        for run in runs:
            run.result()
    finally:
        pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
