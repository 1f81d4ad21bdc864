"""What one hostile client of five does to a run, and what stands against it.

    python -m benchmarks.robustness.poison --out results/poison.json

Client 1 trains as all do, but sends the global weights minus FACTOR times its
own update; BatchNorm's statistics it leaves alone, since variances below zero are
refused at once. Each run is `python main.py` on digits with its defaults otherwise; told
is the linear head on 10 % of the labels, and the kNN accuracy after the last round.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message, MessageType

import main as program
from client import make_client_app, simulated
from fedssl.config.compose import load_config
from fedssl.federation.messages import ARRAYS
from fedssl.runs.directory import RunDirectory
from fedssl.runs.provenance import provenance
from utils import evaluate_run, plain

HOSTILE = 1
UNGUARDED = ["max_update_ratio=null"]
CASES: list[tuple[str, float, list[str]]] = [  # name, factor (0: all are honest), overrides
    ("FedAvg", 0, UNGUARDED),
    ("FedAvg", 5, UNGUARDED),
    ("FedAvg, steps up to 10 times the median (default)", 5, []),
    ("FedAvg, steps up to 3 times the median", 5, ["max_update_ratio=3"]),
    ("Krum", 5, [*UNGUARDED, "strategy=krum"]),
    ("FedMedian", 5, [*UNGUARDED, "strategy=fedmedian"]),
    ("FedTrimmedAvg", 5, [*UNGUARDED, "strategy=fedtrimmedavg"]),
    ("FedAvg", 20, UNGUARDED),
    ("FedAvg, steps up to 10 times the median (default)", 20, []),
]


def make_mod(factor: float) -> Callable:
    """Make a Flower mod that reverses and scales the hostile client's update."""

    def reverse(message: Message, context: Context, call_next: Callable) -> Message:
        training = message.metadata.message_type == MessageType.TRAIN
        if not training or int(context.node_config["partition-id"]) != HOSTILE:
            return call_next(message, context)
        start = message.content.array_records[ARRAYS].to_torch_state_dict()
        reply = call_next(message, context)
        state = reply.content.array_records[ARRAYS].to_torch_state_dict()
        for name, tensor in state.items():
            if "running" not in name:
                state[name] = start[name] - factor * (tensor - start[name])
        reply.content[ARRAYS] = ArrayRecord(state)
        return reply

    return reverse


def run_once(folder: Path, overrides: list[str], factor: float) -> dict:
    """Train and evaluate one run; FACTOR 0 means that all are honest."""
    places = [f"output_dir={folder}", f"cache_dir={folder}/cache"]
    config = load_config("config", [*places, *overrides])
    resources, image_set = program.prepare(config)
    config.num_cpus, config.num_gpus = resources.num_cpus, resources.num_gpus
    run = RunDirectory.create(
        folder / f"run{len(list(folder.iterdir()))}", plain(config), config.output_dir
    )
    clients = make_client_app(simulated(config), mods=[make_mod(factor)] if factor else [])
    program.train(config, resources, image_set, run, clients=clients)
    evaluate_run(run, config, config.eval, image_set, run.last_checkpoint())
    rows = run.read_results()[-1]["rows"]
    heads = {row["encoder"]: row for row in rows if row["method"] == "linear head"}
    rounds = run.read_metrics()
    return {
        "linear_head": heads["federated SimCLR"]["mean"],
        "random_encoder": heads["random encoder"]["mean"],
        "knn": rounds[-1].knn,
        "rejected": sum(len(metrics.failures) for metrics in rounds),
        "warnings": sum(len(metrics.warnings) for metrics in rounds),
    }


def main() -> None:
    """Run all, print a table, and write it with its provenance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args()
    measured = provenance()
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for name, factor, more in CASES:
            found = run_once(Path(folder), [*given.overrides, *more], factor)
            table.append({"strategy": name, "factor": factor, "overrides": more} | found)
            print(json.dumps(table[-1]), flush=True)
            if given.out:
                command = " ".join(["python -m benchmarks.robustness.poison", *given.overrides])
                result = {"command": command, "rows": table, "measured": measured}
                given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
