"""Run what is still missing of the recorded results on CIFAR-10.

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

from fedssl.env import ROOT

RESULTS = ROOT / "results"
SEEDS = (0, 1, 2)
# How the clients of the older comparisons train: momentum begins every round at zero.
SEVEN_ROUNDS = (
    *("num_rounds=7", "train.max_steps=24", "train.statistics=averaged"),
    *("optimizer.momentum_start=zero", "optimizer.muon_learning_rate=0.05"),
    "optimizer.learning_rate=0.03",
)
# In these the images and steps of all clients together are the same: 840 steps of 64.
TWO_CLASSES = ("partition=pathological", "partition.classes_per_client=2")
COMPARED: dict[str, tuple[str, Sequence[str]]] = {  # title in the table, and overrides
    "clients-5": ("5 clients, IID, FedAvg", ()),
    "centralized": (
        "centralized: one client with all images",
        ("num_clients=1", "train.max_steps=120"),
    ),
    "client-alone": ("one of the 5 clients alone", ("participants=[0]",)),
    "clients-2": ("2 clients", ("num_clients=2", "train.max_steps=60")),
    "clients-4": ("4 clients", ("num_clients=4", "train.max_steps=30")),
    "clients-6": ("6 clients", ("num_clients=6", "train.max_steps=20")),
    "clients-8": ("8 clients", ("num_clients=8", "train.max_steps=15")),
    "clients-10": ("10 clients", ("num_clients=10", "train.max_steps=12")),
    "dirichlet": ("5 clients, Dirichlet 0.1", ("partition=dirichlet", "partition.alpha=0.1")),
    "two-classes": ("5 clients, two classes each", TWO_CLASSES),
    "two-classes-fedprox": (
        "5 clients, two classes each, FedProx",
        (*TWO_CLASSES, "strategy=fedprox"),
    ),
    "two-a-round": (
        "5 clients, IID, FedAvg, two of them a round",
        ("strategy.fraction_train=0.4", "train.max_steps=60"),
    ),
    "server-rate": (
        "5 clients, IID, FedAvgM without momentum, server rate 2",
        ("strategy=fedavgm", "strategy.server_momentum=0", "strategy.server_learning_rate=2"),
    ),
    "short-first-rounds": (
        "5 clients, IID, FedAvg, first rounds short",
        ("train.max_steps=35", "train.round_fractions=[0.2,0.4,0.6,0.8,0.8,1,1]"),
    ),
    "fedavgm": ("5 clients, IID, FedAvgM", ("strategy=fedavgm",)),
    "fedadam": ("5 clients, IID, FedAdam", ("strategy=fedadam",)),
}
FIRST = "clients-5"  # has the baselines too, which are the same for all runs of a seed
# Beside that budget what a federation stands between: as many steps one after the other on a fifth
# of the images, and all images with the steps of both clients of a round one after the other.
BETWEEN = ("experiment=cifar10_cpu", "strategy.fraction_train=1", "eval.baselines=false")
# In these the steps of each client are the same, 168 of 64 images, as long as a federation would
# take, but where the title says otherwise.
OF_20, OF_50 = (  # of many clients a fifth measures, which is as many images as one of five holds
    (f"num_clients={count}", "strategy.fraction_evaluate=0.2") for count in (20, 50)
)
FEDERATIONS: dict[str, tuple[str, Sequence[str]]] = {
    "alone": ("one of five clients alone", ("participants=[0]",)),
    "five": ("five clients", ()),
    "five-7-rounds": ("five clients, in 7 rounds", ("num_rounds=7", "train.max_steps=24")),
    "five-14-rounds": ("five clients, in 14 rounds", ("num_rounds=14", "train.max_steps=12")),
    "five-56-rounds": ("five clients, in 56 rounds", ("num_rounds=56", "train.max_steps=3")),
    "five-plain": (
        "five clients, in 7 rounds of FedAvg alone",
        (*SEVEN_ROUNDS, "train.statistics=recomputed"),
    ),
    "central-batch": (
        "all images in one place, the batch of all five",
        ("num_clients=1", "train.batch_size=320"),
    ),
    "central-steps": (
        "all images in one place, the steps of all five",
        ("num_clients=1", "train.max_steps=30"),
    ),
    "alone-steps": (
        "one of five clients alone, the steps of all five",
        ("participants=[0]", "train.max_steps=30"),
    ),
    "two-classes-alone": (
        "one of five clients alone, two classes each",
        ("participants=[0]", *TWO_CLASSES),
    ),
    "two-classes": ("five clients, two classes each", TWO_CLASSES),
    "two-classes-plain": (
        "five clients, two classes each, in 7 rounds of FedAvg alone",
        (*SEVEN_ROUNDS, "train.statistics=recomputed", *TWO_CLASSES),
    ),
    **{
        f"of-20-{count}": (
            f"{count} of 20 clients",
            (*OF_20, f"participants=[{','.join(map(str, range(count)))}]"),
        )
        for count in (1, 2, 5, 10, 20)
    },
    "of-50-1": ("1 of 50 clients", (*OF_50, "participants=[0]")),
    "of-50-50": ("50 clients", OF_50),
}
BUDGETS = {
    "cifar10_cpu": ["experiment=cifar10_cpu"],
    "cifar10_cpu_client_alone": [*BETWEEN, "participants=[0]"],
    "cifar10_cpu_centralized": [*BETWEEN, "num_clients=1", "train.max_steps=880"],
    "cifar10_cpu_long": ["experiment=cifar10_cpu_long"],
}
RUNS: dict[str, list[str]] = BUDGETS | {
    f"sweep/{name}": [
        "experiment=cifar10_sweep",
        *SEVEN_ROUNDS,
        *overrides,
        *([] if name == FIRST else ["eval.baselines=false"]),
    ]
    for name, (_, overrides) in COMPARED.items()
}
RUNS |= {
    f"federation/{name}": ["experiment=cifar10_sweep", *overrides, "eval.baselines=false"]
    for name, (_, overrides) in FEDERATIONS.items()
}
# The budgets take long, and the other strategies get more seeds once a first one helps.
ONE_SEED = {*BUDGETS} | {
    f"sweep/{name}" for name in ("short-first-rounds", "two-classes-fedprox", "fedadam")
}
# Evaluations besides that of main.py, by run.
EVALUATIONS: dict[str, list[list[str]]] = {
    f"sweep/{FIRST}": [
        ["label_fraction=0.01"],
        ["label_fraction=1.0", "seeds=1"],
        ["eval=finetune", "seeds=1", "baselines=false", "batch_size=64"],
        ["eval=supervised", "seeds=1", "baselines=false", "epochs=20"],
    ],
    "sweep/centralized": [
        ["label_fraction=0.01", "baselines=false"],
        ["label_fraction=1.0", "seeds=1", "baselines=false"],
    ],
}


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


def run_one(name: str, seed: int, path: str, scratch: Path, jobs: int = 1) -> None:
    """Train and evaluate one run, then put its record in place as a whole.

    After an interruption it goes on with the first command that was not finished,
    unless those that were are not the same any more.

    Args:
        jobs: how many runs share the machine.
    """
    output = scratch / name / f"seed{seed}"
    run, finished = output / "run", output / "commands.json"
    places = [f"dataset.path={path}", f"output_dir={output}", f"run_dir={run}"]
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
    if left and not given.path:
        parser.error("--path is missing: a local copy of uoft-cs/cifar10")
    path, shares = str(Path(given.path).resolve()) if left else "", share_cores(given.jobs)
    # The processes that a thread starts have its cores.
    pool = ThreadPoolExecutor(given.jobs, initializer=lambda: os.sched_setaffinity(0, next(shares)))
    try:
        runs = [pool.submit(run_one, *run, path, given.scratch, given.jobs) for run in left]
        for run in runs:
            run.result()
    finally:
        pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
