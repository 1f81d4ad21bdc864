"""Try a recipe as a small federation in one process; the test set stays unseen.

    python -m benchmarks.accuracy.tune --path=cifar10-parquet experiment=cifar10_sweep
    python -m benchmarks.accuracy.tune --path=cifar10-parquet --encode=24,32 experiment=cifar10_cpu
    python -m benchmarks.accuracy.tune seed=1             # without a path, on the digits

Of the 50,000 training images 4,000 are kept apart, the others are dealt out to the clients, which
train as those of main.py do. After the last round linear head and kNN, both with 5,000 labels,
are scored on the 4,000. Of the digits it is 300, with 115 labels, and the mean of ten draws of
these; their trials are those scored at 8 pixels, with the defaults of their commit. Overrides are
those of main.py.

Every trial is a line of results/tuning.jsonl. Those recorded until now had rounds of the script's
own: clients held no images out, the partition was IID, FedProx's term was missing, losses are means
of clients. Those with a commit name it; those without are by drafts of this script:
the ones with `arguments` had one client alone with 9,000 images, and flags for what main.py does
not offer because it did not help (the script of commit 34d44f9 gives the same); the two with
`train.round_lengths` (now `train.round_fractions`) are as they say; the five others with
`overrides` dealt images and clients out by other random numbers, and their losses are means of
the last 20 steps of a round instead of all; the ones with `arguments_of_a_draft` that begin
with a stem had one client with 44,000 images, in one go (losses: means of its sevenths, of all
heads together), and 6,000 images for scoring, by a head with weight decay 0.1. Of their
arguments, `temp` is the temperature, `crop0` and `crop1` the crops' scale, `deep` the stages
with heads of their own, `muonlr`, `nssteps` and `mat` are Muon's rate, iterations and weights
(convolutions alone, or those of the heads too), `opt=muonn` also keeps the weights' norms,
`views=4` are four views of half as many images, `loss=dcl` is the decoupled loss of
https://arxiv.org/abs/2110.06848, `layers` those of the projection head; `all_stages` is the
linear head on the features of all four stages at once.

Those with `arguments_of_trials` are by a script that their commit has as
benchmarks/accuracy/trials.py (the last six with `momentum_buffer` for its `velocity`): all
clients in one process, its own rounds, scores with the
statistics that clients averaged, and with statistics taken anew over views and over whole
images. Its `--momentum`, `--recal`, `--fixbn` and `--synth` are what
`optimizer.momentum_start`, `train.statistics`, `train.global_statistics_from` (there a round)
and `method.shared_negatives` do.
"""

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from client import ClientState, make_client_app, simulated
from fedssl.compute import Backend, choose_backend, count_cores
from fedssl.config.compose import load_config
from fedssl.data.image_set import Images
from fedssl.data.partitions import partition_rows
from fedssl.env import ROOT
from fedssl.errors import UserError
from fedssl.evaluation.base import draw_labelled
from fedssl.evaluation.features import extract_features
from fedssl.evaluation.knn import knn_accuracy
from fedssl.evaluation.linear import train_linear_head
from fedssl.federation.local_grid import LocalGrid
from fedssl.federation.nodes import Nodes
from fedssl.methods.base import local_arrays
from fedssl.networks.encoder import Encoder
from fedssl.runs.directory import RunDirectory
from fedssl.runs.metrics import RoundMetrics
from fedssl.runs.provenance import provenance
from fedssl.training.local import cache_on_device
from utils import (
    build_federation,
    build_method,
    build_patience,
    build_schedule,
    build_train_settings,
    build_views,
    open_images,
    plain,
)

# By dataset: images kept apart, images with labels, and draws of these.
SIZES = {"cifar10": (4000, 5000, 1), "digits": (300, 115, 10)}
NEIGHBORS = 10


def split_images(
    images: Images, config: DictConfig
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Draw the clients' rows, several times those with labels, and those that are scored."""
    validation, labelled, draws = SIZES[config.dataset.name]
    order = np.random.default_rng(config.seed).permutation(len(images.pixels))
    held, rest = np.sort(order[:validation]), np.sort(order[validation:])
    share, kept = labelled / len(rest), Images(images.pixels[rest], images.labels[rest])
    drawn = [rest[draw_labelled(kept.labels, share, draw)] for draw in range(draws)]
    parts = partition_rows(kept, config.num_clients, plain(config.partition), config.seed)
    return [rest[part] for part in parts], drawn, held


def open_clients(
    config: DictConfig, images: Images, parts: list[np.ndarray], backend: Backend
) -> LocalGrid:
    """Make the clients of a run on the given rows, one process for all of them."""
    method = build_method(config, backend.device)
    state = ClientState(
        pixels=cache_on_device(images.pixels, backend.device),
        partitions=parts,
        method=method,
        backend=backend,
        views=build_views(config),
        schedule=build_schedule(config),
        settings=build_train_settings(config),
        seed=config.seed,
        held_out=config.held_out,
        first_local=local_arrays(method),
    )
    return LocalGrid(make_client_app(simulated(config), load=lambda client: state), len(parts))


def train(
    config: DictConfig, grid: LocalGrid, run: RunDirectory
) -> tuple[Encoder, list[RoundMetrics]]:
    """Train all rounds; give the encoder and the rounds' numbers."""
    rounds: list[RoundMetrics] = []

    def keep(metrics: RoundMetrics) -> None:
        rounds.append(metrics)
        loss = f"{metrics.train_loss:.3f}"
        print(f"round {metrics.round}/{config.num_rounds}: loss {loss}", flush=True)

    nodes = Nodes(grid, build_patience(config))
    federation = build_federation(config, nodes, run, image_set=None)
    federation.train(keep)
    return federation.encoder(), rounds


def score(
    encoder: Encoder,
    images: Images,
    labelled: list[np.ndarray],
    held: np.ndarray,
    config: DictConfig,
    backend: Backend,
    resolution: int,
) -> dict[str, float]:
    """Score linear head and kNN on images of so many pixels, in percent."""
    settings = instantiate(plain(config.eval))
    used = np.unique(np.concatenate([*labelled, held]))
    batch_size = settings.feature_batch_size
    features = extract_features(encoder, images.pixels[used], backend, batch_size, resolution)
    asked, answers = features[np.searchsorted(used, held)], images.labels[held]
    classes, linear, knn = int(images.labels.max()) + 1, [], []
    for draw, rows in enumerate(labelled):
        known, labels = features[np.searchsorted(used, rows)], images.labels[rows]
        predict = train_linear_head(known, labels, classes, settings, draw)
        linear.append(100 * float((predict(asked) == answers).mean()))
        knn.append(100 * knn_accuracy(known, labels, asked, answers, NEIGHBORS))
    return {"linear_head": round(np.mean(linear), 1), "knn": round(np.mean(knn), 1)}


def try_recipe(config: DictConfig, images: Images, resolutions: list[int]) -> dict[str, Any]:
    """Train all rounds and score; give the losses, images and seconds too."""
    parts, labelled, held = split_images(images, config)
    backend = choose_backend(config.precision)
    with tempfile.TemporaryDirectory() as folder:  # nobody needs the run's files
        run = RunDirectory.create(Path(folder, "run"), plain(config), folder)
        encoder, rounds = train(config, open_clients(config, images, parts, backend), run)
    scored = (images, labelled, held, config, backend)
    return {
        "losses": [round(metrics.train_loss, 3) for metrics in rounds],
        "images": sum(client.images or 0 for metrics in rounds for client in metrics.clients),
        "train_s": round(sum(metrics.seconds_train for metrics in rounds)),
        "by_pixels": {str(side): score(encoder, *scored, side) for side in resolutions},
    }


def whole_numbers(text: str) -> list[int]:
    """Read numbers with commas in between."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Run one trial and record it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", help="a local copy of uoft-cs/cifar10; default: the digits")
    parser.add_argument("--encode", type=whole_numbers, help="sizes to score, in pixels: 16,24")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "tuning.jsonl")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args()
    torch.set_num_threads(count_cores())
    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # it tells of every aggregation
    try:
        dataset = ["dataset=cifar10"] if given.path else []
        config = load_config("config", [*dataset, *given.overrides])
        config.dataset.path = given.path
        if config.dataset.name not in SIZES:
            raise UserError(f"dataset={config.dataset.name}: trials are of {' or '.join(SIZES)}")
        images = open_images(config, report=print).train
    except UserError as error:
        parser.error(str(error))
    measured = provenance()
    resolutions = given.encode or [build_schedule(config).eval_resolution(config.num_rounds)]
    line = {"overrides": given.overrides, **try_recipe(config, images, resolutions)}
    line["measured"] = measured
    print(json.dumps(line))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
