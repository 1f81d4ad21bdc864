"""What secure aggregation costs a round: seconds and bytes beside the plain one.

    python -m benchmarks.privacy.masking --out results/privacy/masking.json

Five clients in this process train a single step, so that what remains is the round itself:
plain, masked, and masked with one client that fails after its keys were agreed on. The bytes
are those of all arrays and config records, of all messages and replies of the training. A
round of each kind follows the other, so that their ratio is of one run.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Error, Message

from client import make_client_app, simulated
from fedssl.config.compose import load_config
from fedssl.federation.local_grid import LocalGrid
from fedssl.federation.messages import count_bytes
from fedssl.federation.nodes import Nodes
from fedssl.runs.directory import RunDirectory
from fedssl.runs.provenance import provenance
from utils import build_federation, build_patience, plain

CLIENTS, FAILING = 5, 3
SMALL = [f"num_clients={CLIENTS}", "num_rounds=1", "train.max_steps=1", "train.local_epochs=1"]
SMALL += ["model.stem=imagenet", "precision=float32", "train.batch_size=8", "num_cpus=1"]
KINDS: dict[str, tuple[list[str], bool]] = {
    "plain": ([], False),
    "masked": (["secure_aggregation=true"], False),
    "masked, one of five fails": (["secure_aggregation=true"], True),
}


class CountingGrid(LocalGrid):
    """Counts what is said until the evaluation begins, and lets a client fail."""

    def __init__(self, clients: Any, fails: bool) -> None:
        super().__init__(clients, CLIENTS)
        self.fails, self.bytes, self.seconds = fails, 0, 0.0

    def answer(self, message: Message, context: Context) -> Message:
        """Answer a message, and count it with its reply."""
        if message.metadata.message_type == "evaluate":
            return super().answer(message, context)
        self.bytes += count_bytes(message.content)
        if (
            self.fails
            and message.metadata.message_type == "train"
            and context.node_config["partition-id"] == FAILING
        ):
            error = Message(Error(2, "gone"), reply_to=message)
            error.metadata.__dict__["_reply_to_message_id"] = message.metadata.message_id
            return error
        began = time.perf_counter()
        reply = super().answer(message, context)
        self.seconds += time.perf_counter() - began
        self.bytes += count_bytes(reply.content)
        return reply


def run_round(overrides: list[str], fails: bool, folder: str) -> dict[str, float]:
    """Run a round; give its seconds, those of the clients among them, and its bytes."""
    config = load_config("config", [*SMALL, *overrides, f"output_dir={folder}"])
    run = RunDirectory.create(Path(tempfile.mkdtemp(dir=folder)), plain(config), folder)
    grid = CountingGrid(make_client_app(simulated(config)), fails)
    federation = build_federation(config, Nodes(grid, build_patience(config)), run, None)
    kept: list[Any] = []
    keep: Callable[[Any], None] = kept.append
    federation.train(keep)
    seconds = kept[0].seconds_train
    return {
        "seconds": seconds,
        "seconds_of_server": round(seconds - grid.seconds, 3),
        "megabytes": grid.bytes / 1e6,
    }


def main() -> None:
    """Measure, print, and write everything with its provenance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    table: dict[str, Any] = {}
    for encoder in ("resnet18", "resnet50"):
        found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for _ in range(given.repeats + 1):
            for kind, (overrides, fails) in KINDS.items():
                with tempfile.TemporaryDirectory() as folder:
                    found[kind].append(run_round([f"model={encoder}", *overrides], fails, folder))
        table[encoder] = {
            kind: {key: float(np.median([each[key] for each in rounds[1:]])) for key in rounds[0]}
            for kind, rounds in found.items()  # but for the first, which opens the images
        }
        print(encoder, json.dumps(table[encoder], indent=2), flush=True)
    if given.out:
        result = {"clients": CLIENTS, "rounds": table, "measured": provenance()}
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
