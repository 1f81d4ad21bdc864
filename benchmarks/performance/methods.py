"""Images per second of every method beside SimCLR's, at the budget of the comparison of methods.

    python -m benchmarks.performance.methods --path=cifar10-parquet --out results/methods_speed.json

A client trains six steps of 64 images by each method in turn, again and again, so that the
ratios are of one run on one machine. The first turn is not counted.
"""

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.accuracy.recorded import METHODS, ROUND_STEPS, SAME_TRAINING
from fedssl.compute import choose_backend
from fedssl.config.compose import load_config
from fedssl.runs.provenance import provenance
from fedssl.seeding import generator_for
from fedssl.training.local import cache_on_device, local_train
from utils import build_method, build_schedule, build_train_settings, build_views, open_images

FIRST = "simclr"


class Client:
    """A client that trains by one method."""

    def __init__(self, overrides: list[str], pixels: np.ndarray | None) -> None:
        self.config = load_config("config", overrides)
        self.backend = choose_backend(self.config.precision)
        found = open_images(self.config).train.pixels if pixels is None else pixels
        self.pixels = found
        self.method = build_method(self.config, self.backend.device)
        self.images = cache_on_device(found, self.backend.device)
        self.rows = np.arange(len(found) // self.config.num_clients)

    def images_per_second(self, turn: int) -> float:
        """Train a round's steps."""
        result = local_train(
            self.method,
            self.images,
            self.rows,
            build_views(self.config, build_schedule(self.config).train_resolution(1)),
            build_train_settings(self.config),
            plan=build_schedule(self.config).plan(1),
            proximal_mu=0.0,
            generator=generator_for(self.config.seed, "speed", turn),
            backend=self.backend,
        )
        return result.images_per_second


def main() -> None:
    """Measure in turns, print, and write everything with its provenance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", required=True, help="a local copy of uoft-cs/cifar10")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    clients: dict[str, Client] = {}
    for name, (_, overrides) in METHODS.items():
        if name in SAME_TRAINING:
            continue
        common = ["experiment=cifar10_sweep", f"dataset.path={given.path}"]
        pixels = clients[FIRST].pixels if clients else None
        clients[name] = Client([*common, *overrides], pixels)
    paces: dict[str, list[float]] = {name: [] for name in clients}
    for turn in range(given.turns + 1):
        for name, client in clients.items():
            paces[name].append(client.images_per_second(turn))
    table: dict[str, Any] = {}
    for name, found in paces.items():
        ratios = [pace / first for pace, first in zip(found[1:], paces[FIRST][1:], strict=True)]
        table[name] = {
            "images_per_second": round(median(found[1:]), 1),
            "of_simclr": round(median(ratios), 3),
            "lowest": round(min(ratios), 3),
            "highest": round(max(ratios), 3),
        }
        print(name, json.dumps(table[name]), flush=True)
    if given.out:
        steps = {"steps": ROUND_STEPS, "turns": given.turns}
        result = steps | {"methods": table, "measured": provenance()}
        given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
