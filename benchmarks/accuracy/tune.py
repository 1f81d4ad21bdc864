"""Try a recipe as a small federation in one process; the test set stays unseen.

    python -m benchmarks.accuracy.tune --path=cifar10-parquet experiment=cifar10_sweep
    python -m benchmarks.accuracy.tune --path=cifar10-parquet --encode=24,32 experiment=cifar10_cpu
    python -m benchmarks.accuracy.tune seed=1             # without a path, on the digits

Of the 50,000 training images 4,000 are kept apart, the others are dealt out to the clients.
After the last round linear head and kNN, both with 5,000 labels, are scored on the 4,000.
Of the digits it is 300, with 115 labels, and the mean of ten draws of these; their trials are
those scored at 8 pixels, with the defaults of their commit. Overrides are those of main.py; the
partition is always IID.

Every trial is a line of results/tuning.jsonl. Those without a commit are by drafts of this script:
the ones with `arguments` had one client alone with 9,000 images, and flags for what main.py does
not offer because it did not help (the script of commit 34d44f9 gives the same); the two with
`train.round_lengths` are as they say; the five others with `overrides` dealt images and clients
out by other random numbers, and their losses are means of the last 20 steps of a round instead
of all; the ones with `arguments_of_a_draft` that begin
with a stem had one client with 44,000 images, in one go (losses: means of its sevenths, of all
heads together), and 6,000 images for scoring, by a head with weight decay 0.1. Of their
arguments, `temp` is the temperature, `crop0` and `crop1` the crops' scale, `deep` the stages
with heads of their own, `muonlr`, `nssteps` and `mat` are Muon's rate, iterations and weights
(convolutions alone, or those of the heads too), `opt=muonn` also keeps the weights' norms,
`views=4` are four views of half as many images, `loss=dcl` is the decoupled loss of
https://arxiv.org/abs/2110.06848, `layers` those of the projection head; `all_stages` is the
linear head on the features of all four stages at once.
"""

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.serverapp.strategy.fedopt import FedOpt
from flwr.supercore.task_identity import TaskIdentity
from omegaconf import DictConfig

from fedssl.compute import choose_device, choose_dtype
from fedssl.config.compose import load_config
from fedssl.data.cache import open_image_set
from fedssl.data.image_set import Images
from fedssl.data.views import make_augmentation
from fedssl.env import ROOT
from fedssl.errors import UserError
from fedssl.evaluation.features import extract_features
from fedssl.evaluation.knn import knn_accuracy
from fedssl.evaluation.linear import draw_labelled, train_linear_head
from fedssl.federation.aggregation import aggregate, combinable, make_strategy
from fedssl.federation.guards import Update
from fedssl.federation.resources import clients_per_round, count_cores
from fedssl.runs.provenance import provenance
from fedssl.seeding import generator_for
from fedssl.training.local import TrainResult, local_train
from fedssl.training.optimizers import make_optimization
from fedssl.training.schedule import encode_size, plan_round, view_size
from model import SimCLR
from utils import build_model, open_source

TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1  # messages ask for them
# By dataset: images kept apart, images with labels, and draws of these.
SIZES = {"cifar10": (4000, 5000, 1), "digits": (300, 115, 10)}


def split_images(
    labels: np.ndarray, config: DictConfig
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Draw the clients' rows, several times those with labels, and those that are scored."""
    validation, labelled, draws = SIZES[config.dataset.name]
    order = np.random.default_rng(config.seed).permutation(len(labels))
    held, rest = np.sort(order[:validation]), np.sort(order[validation:])
    drawn = [rest[draw_labelled(labels[rest], labelled / len(rest), i)] for i in range(draws)]
    shuffled = np.random.default_rng(config.seed + 1).permutation(rest)
    return np.array_split(shuffled, config.num_clients), drawn, held


def train_round(
    model: SimCLR,
    strategy: FedAvg,
    pixels: np.ndarray,
    parts: list[np.ndarray],
    config: DictConfig,
    number: int,
) -> list[TrainResult]:
    """Train the sampled clients one after the other; the model becomes what they make together."""
    sampled = clients_per_round(len(parts), config.strategy.fraction_train)
    chosen = np.random.default_rng((config.seed, number)).permutation(len(parts))[:sampled]
    device, rounds = choose_device(), config.num_rounds
    size = view_size(config.train.view_sizes, config.dataset.image_size, number, rounds)
    length, run_part = plan_round(config.train, number, rounds)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sent = combinable(strategy, model, start)  # strategies note what Flower sends out
    if isinstance(strategy, FedOpt):
        strategy.current_arrays = {name: array.numpy() for name, array in sent.items()}
    elif getattr(strategy, "current_arrays", start) is None:
        strategy.current_arrays = sent
    results, updates = [], []
    for client in map(int, chosen):
        model.load_state_dict(start)
        result = local_train(
            model,
            pixels,
            parts[client],
            make_augmentation(config.augment, size),
            make_optimization(config.train),
            length=length,
            run_part=run_part,
            proximal_mu=0.0,
            generator=generator_for(config.seed, "train", number, client),
            device=device,
            dtype=choose_dtype(config.precision, device),
        )
        results.append(result)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        reply = Message(RecordDict(), dst_node_id=client, message_type=MessageType.TRAIN)
        updates.append(Update(client, len(parts[client]), {}, state, reply))
    model.load_state_dict(aggregate(strategy, number, updates, model))
    return results


def score(
    model: SimCLR,
    images: Images,
    labelled: list[np.ndarray],
    held: np.ndarray,
    config: DictConfig,
    size: int,
) -> dict[str, float]:
    """Score linear head and kNN on images of so many pixels, in percent."""
    device = choose_device()
    dtype = choose_dtype(config.precision, device)
    used = np.unique(np.concatenate([*labelled, held]))
    features = extract_features(model, images.pixels[used], device, dtype, 256, size)
    asked, answers = features[np.searchsorted(used, held)], images.labels[held]
    classes, linear, knn = int(images.labels.max()) + 1, [], []
    for draw, rows in enumerate(labelled):
        known, labels = features[np.searchsorted(used, rows)], images.labels[rows]
        predict = train_linear_head(known, labels, classes, config.eval, draw)
        linear.append(100 * float((predict(asked) == answers).mean()))
        knn.append(100 * knn_accuracy(known, labels, asked, answers, 10))
    return {"linear_head": round(np.mean(linear), 1), "knn": round(np.mean(knn), 1)}


def try_recipe(config: DictConfig, images: Images, sizes: list[int]) -> dict[str, Any]:
    """Train all rounds and score; give the losses, images and seconds too."""
    parts, labelled, held = split_images(images.labels, config)
    model = build_model(config.model, config.dataset, config.seed, choose_device())
    strategy = make_strategy(config.strategy)
    began, seen, losses = time.perf_counter(), 0, []
    for number in range(1, config.num_rounds + 1):
        results = train_round(model, strategy, images.pixels, parts, config, number)
        seen += sum(result.images for result in results)
        losses.append(round(float(np.mean([result.loss for result in results])), 3))
        print(f"round {number}/{config.num_rounds}: loss {losses[-1]}", flush=True)
    train_s = round(time.perf_counter() - began)
    scores = {str(size): score(model, images, labelled, held, config, size) for size in sizes}
    return {"losses": losses, "images": seen, "train_s": train_s, "by_pixels": scores}


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
        places = (config.dataset.image_size, config.cache_dir, config.seed)
        images = open_image_set(open_source(config.dataset), *places, report=print).train
    except UserError as error:
        parser.error(str(error))
    measured = provenance()
    rounds, side = config.num_rounds, config.dataset.image_size
    sizes = given.encode or [encode_size(config.train, side, rounds, rounds)]
    line = {"overrides": given.overrides, **try_recipe(config, images, sizes)}
    line["measured"] = measured
    print(json.dumps(line))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
