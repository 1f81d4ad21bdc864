"""Try a recipe on a validation part of the training images; the test set stays unseen.

    python benchmarks/tune.py --path=cifar10-parquet train.temperature=0.2
    python benchmarks/tune.py --path=cifar10-parquet --budget-s=600 train.batch_size=64

Runs the rounds of FedAvg in this one process, each client on all cores, without Ray.
After the rounds that --probe names, a linear head on 10 % of the labels is scored on
5,000 training images that no client trains on. Every trial is a line of
results/tuning.jsonl: what was overridden, and what it gave after which time.
--budget-s ends a trial early, without changing its schedule; use it to compare
starts, and a smaller num_rounds or train.max_steps to compare whole schedules.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from augment import make_augmentation, view_size  # noqa: E402
from config import load_config  # noqa: E402
from features import extract_features, knn_accuracy  # noqa: E402
from heads import draw_labelled, train_linear_head  # noqa: E402
from model import build_model  # noqa: E402
from partitions import partition_rows, split_held_out  # noqa: E402
from resources import count_cores  # noqa: E402
from rundir import provenance  # noqa: E402
from training import local_train, make_optimization  # noqa: E402
from utils import (  # noqa: E402
    Images,
    choose_device,
    choose_dtype,
    generator_for,
    open_image_set,
)

VALIDATION = 5000
HEAD_SEED = 0


class Trial:
    """A federation of one process, and the validation images it is scored on."""

    def __init__(self, config: DictConfig, train: Images) -> None:
        self.config, self.train = config, train
        self.device = choose_device()
        self.dtype = choose_dtype(config.precision, self.device)
        order = np.random.default_rng(0).permutation(len(train.pixels))
        self.held, rest = order[:VALIDATION], np.sort(order[VALIDATION:])
        part = Images(train.pixels[: len(rest)], train.labels[rest])  # dealt out by number
        dealt = partition_rows(part, config.num_clients, config.partition, config.seed)
        self.clients = [split_held_out(rest[rows], config.held_out)[0] for rows in dealt]
        self.labelled = rest[draw_labelled(part.labels, 0.1, HEAD_SEED)]
        self.model = build_model(config.model, config.dataset, config.seed, self.device)

    def run_round(self, number: int) -> float:
        """Train every client from the same weights and average; return the mean loss."""
        start = {name: value.clone() for name, value in self.model.state_dict().items()}
        total: dict[str, Tensor] = {}
        losses, count = [], sum(map(len, self.clients))
        for partition, rows in enumerate(self.clients):
            self.model.load_state_dict(start)
            losses.append(self._train_client(number, partition, rows))
            for name, value in self.model.state_dict().items():
                total[name] = total.get(name, 0) + value.double() * (len(rows) / count)
        self.model.load_state_dict({k: v.to(start[k].dtype) for k, v in total.items()})
        return float(np.average(losses, weights=list(map(len, self.clients))))

    def _train_client(self, number: int, partition: int, rows: np.ndarray) -> float:
        config = self.config
        size = self._size(number)
        result = local_train(
            self.model,
            self.train.pixels,
            rows,
            make_augmentation(config.augment, size),
            make_optimization(config.train),
            run_part=((number - 1) / config.num_rounds, number / config.num_rounds),
            proximal_mu=0.0,
            generator=generator_for(config.seed, "train", number, partition),
            device=self.device,
            dtype=self.dtype,
        )
        return result.loss

    def _size(self, number: int) -> int:
        sizes, image_size = self.config.train.view_sizes, self.config.dataset.image_size
        return view_size(sizes, image_size, number, self.config.num_rounds)

    def score(self, number: int) -> dict[str, float]:
        """Score a linear head and kNN, both with 10 % of the labels, on the held images."""
        features, queries = (self._features(rows, number) for rows in (self.labelled, self.held))
        labels, answers = self.train.labels[self.labelled], self.train.labels[self.held]
        predict = train_linear_head(features, labels, 10, self.config.eval, HEAD_SEED)
        return {
            "linear_head": float((predict(queries) == answers).mean()),
            "knn": knn_accuracy(features, labels, queries, answers, 10),
        }

    def _features(self, rows: np.ndarray, number: int) -> np.ndarray:
        pixels = self.train.pixels[np.sort(rows)]
        features = extract_features(
            self.model, pixels, self.device, self.dtype, 256, self._size(number)
        )
        return features[np.argsort(np.argsort(rows))]


def run_trial(trial: Trial, probe: set[int], budget_s: float) -> list[dict[str, Any]]:
    """Run the rounds, or as many as the budget allows; tell loss and scores of each."""
    rows, spent = [], 0.0
    for number in range(1, trial.config.num_rounds + 1):
        began = time.perf_counter()
        row: dict[str, Any] = {"round": number, "loss": trial.run_round(number)}
        spent += time.perf_counter() - began
        row["train_s"] = round(spent, 1)
        ends = number == trial.config.num_rounds or spent > budget_s
        if ends or number in probe:
            row |= trial.score(number)
        rows.append(row)
        print(json.dumps(row), flush=True)
        if ends:
            break
    return rows


def main() -> None:
    """Run one trial and record it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", required=True, help="a local copy of uoft-cs/cifar10")
    parser.add_argument("--probe", type=int, nargs="*", default=[], help="rounds to score")
    parser.add_argument("--budget-s", type=float, default=float("inf"))
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "tuning.jsonl")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args()
    torch.set_num_threads(count_cores())
    config = load_config("config", ["dataset=cifar10", *given.overrides])
    config.dataset.path = given.path
    train = open_image_set(config.dataset, config.cache_dir, config.seed, report=print).train
    measured = provenance()
    rows = run_trial(Trial(config, train), set(given.probe), given.budget_s)
    line = {"overrides": given.overrides, "rounds": rows, "measured": measured}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
