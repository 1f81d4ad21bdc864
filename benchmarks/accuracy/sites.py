"""Compare heads from sums with those of all features in one place, however images are dealt out.

    python -m benchmarks.accuracy.sites --run outputs/latest --out results/sites/digits/seed0.json

For each way to deal the images of a run out, and each number of sites, the head from the
sites' sums is compared with scikit-learn's ridge regression on all drawn features in one
place, with the same decay: on how many test images they agree. Beside it stand the
accuracies of the heads of `eval=federated` and of the linear head with all labels in one
place, for three draws of labels. No class is left out for its few images at a site. With
`--tune` five sites tune encoder and head, too, with one of the draws.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from fedssl.compute import choose_backend
from fedssl.config.compose import load_config
from fedssl.data.image_set import ImageSet
from fedssl.data.partitions import partition_rows
from fedssl.errors import UserError
from fedssl.evaluation.base import EvaluationData
from fedssl.evaluation.linear import train_linear_head
from fedssl.networks.encoder import Encoder
from fedssl.runs.directory import RunDirectory
from fedssl.runs.provenance import provenance
from fedssl.runs.results import BY_ROUNDS, FROM_SUMS, OWN_HEADS, Score
from fedssl.sites.evaluation import FederatedEvaluation
from fedssl.sites.finetune import FederatedFineTuning
from fedssl.sites.heads import fit_from_sums, score, score_own, train_by_rounds
from fedssl.sites.site import LocalSites, Site
from fedssl.sites.sums import DECAYS, TEMPERATURES, Head
from utils import load_trained, open_evaluation, open_images, plain, select

DEALT = {
    "IID": ["partition=iid"],
    "Dirichlet 0.1": [
        "partition=dirichlet",
        "partition.alpha=0.1",
        "partition.min_partition_size=0",
    ],
    "two classes each": ["partition=pathological", "partition.classes_per_client=2"],
}
COUNTS = (5, 100)
HEADS = (FROM_SUMS, BY_ROUNDS, OWN_HEADS, "linear head")  # the last with all labels in one place


def deal(image_set: ImageSet, count: int, overrides: Sequence[str], seed: int) -> list[np.ndarray]:
    """Deal the training images out to sites."""
    spec = plain(load_config("config", list(overrides)).partition)
    if "classes_per_client" in spec:  # its groups are as many as there are classes to group
        classes = len(image_set.class_names)
        groups = deal_groups(image_set, count, spec["classes_per_client"], seed)
        return (
            groups
            if count > classes // spec["classes_per_client"]
            else partition_rows(image_set.train, count, spec, seed)
        )
    return partition_rows(image_set.train, count, spec, seed)


def deal_groups(image_set: ImageSet, count: int, classes: int, seed: int) -> list[np.ndarray]:
    """Give each site images of some classes, where there are more sites than groups."""
    labels = image_set.train.labels
    if labels is None:
        raise UserError("these images have no labels")
    random = np.random.default_rng(seed)
    order = random.permutation(len(image_set.class_names))
    groups = np.array_split(order, len(order) // classes)
    parts = []
    for place, group in enumerate(groups):
        rows = random.permutation(np.flatnonzero(np.isin(labels, group)))
        parts += np.array_split(rows, len(range(place, count, len(groups))))
    return parts


def in_one_place(sites: dict[int, Site], head: Head, test: np.ndarray) -> float:
    """Tell on what share of the test images a ridge regression in one place agrees with a head.

    Its decay is that of `DECAYS` whose scores come nearest.
    """
    features = np.concatenate([site.features for site in sites.values()]).astype(np.float64)
    labels = np.concatenate([site.labels for site in sites.values()])
    scaler = StandardScaler().fit(features)
    inputs, queries = scaler.transform(features), scaler.transform(test.astype(np.float64))
    targets = np.eye(head.weight.shape[1])[labels]
    given = test @ head.weight + head.bias  # divided by one of the temperatures
    scores = [
        Ridge(alpha=decay * len(labels)).fit(inputs, targets).predict(queries) for decay in DECAYS
    ]
    nearest = min(
        scores,
        key=lambda each: min(float(np.abs(each - given * t).max()) for t in TEMPERATURES),
    )
    return float((nearest.argmax(axis=1) == given.argmax(axis=1)).mean())


def compare(
    evaluation: FederatedEvaluation, data: EvaluationData, features: np.ndarray, test: np.ndarray
) -> dict[str, Any]:
    """Compare the heads of each draw; give means and values."""
    agree: list[float] = []
    rows: dict[str, list[float]] = {name: [] for name in HEADS}
    for seed in data.seeds:
        draw = evaluation.draw(data, seed)
        sites = evaluation.make_sites([features[drawn] for drawn in draw], draw, test, data)
        asked = LocalSites(sites, seed)
        standardized, head = fit_from_sums(asked, evaluation.folds)
        agree.append(in_one_place(sites, head, test))
        trained = train_by_rounds(asked, standardized, evaluation.head)
        bank = np.concatenate([site.features for site in sites.values()])
        labels = np.concatenate([site.labels for site in sites.values()])
        predict = train_linear_head(bank, labels, data.num_classes, evaluation, seed)
        shared = score(asked, [head, trained])
        values = [*(found.top1 for found in shared), score_own(asked, head).top1]
        for name, value in zip(HEADS, [*values, data.top1(predict(test))], strict=True):
            rows[name].append(value)
    scores = {name: Score("", name, values).to_json() for name, values in rows.items()}
    told = {name: {k: row[k] for k in ("top1", "mean", "std")} for name, row in scores.items()}
    return {"agreement": agree, **told}


def tune(settings: DictConfig, encoder: Encoder, data: EvaluationData) -> dict[str, Any]:
    """Tune encoder and head at the sites with one draw of labels; give the top-1 of each row."""
    evaluation, first = select(FederatedFineTuning, settings), replace(data, seeds=data.seeds[:1])
    rows = evaluation.run("", encoder, first)
    return {row.method: row.mean for row in rows if row.method != FROM_SUMS}


def measure(
    run: RunDirectory, config: DictConfig, tuning: DictConfig | None
) -> Iterator[dict[str, Any]]:
    """Give an entry for each way to deal the run's images out.

    Args:
        tuning: settings of the fine-tuning; None for none.
    """
    image_set = open_images(config)
    backend = choose_backend(config.precision)
    method, round_number = load_trained(config, run.last_checkpoint(), backend.device)
    evaluation, data = open_evaluation(config.eval, config, image_set, round_number, backend)
    if not isinstance(evaluation, FederatedEvaluation):
        raise UserError("eval: must be federated")
    features = data.features(method.encoder, data.train.pixels)
    test = data.features(method.encoder, data.test.pixels)
    for name, overrides in DEALT.items():
        for count in COUNTS:
            parts = deal(image_set, count, overrides, config.seed)
            dealt = replace(data, partitions=parts)
            entry = {"dealt": name, "sites": count, **compare(evaluation, dealt, features, test)}
            if tuning and count == COUNTS[0]:
                entry["tuned"] = tune(tuning, method.encoder, dealt)
            print(json.dumps(entry), flush=True)
            yield entry


def main() -> None:
    """Measure, and write everything with its provenance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="directory of a run")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tune", action="store_true", help="tune the encoder, too")
    given = parser.parse_args()
    run = RunDirectory(given.run.resolve())
    config = run.load_config()
    config.eval, tuning = (
        load_config("config", [f"eval={name}", "eval.min_images=1"]).eval
        for name in ("federated", "federated_finetune")
    )
    for key in ("learning_rate", "weight_decay"):
        config.eval[key] = config.head[key]
    tuning.weight_decay = config.head.weight_decay
    entries = list(measure(run, config, tuning if given.tune else None))
    for place in ("output_dir", "run_dir", "cache_dir", "resume"):
        del config[place]
    config.dataset.path = None
    facts = {"command": "python -m benchmarks.accuracy.sites", "measured": provenance()}
    facts |= {"run": plain(config), "round": len(run.read_metrics())}
    if given.tune:
        facts["tuning"] = plain(tuning)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({**facts, "results": entries}, indent=2) + "\n")


if __name__ == "__main__":
    main()
