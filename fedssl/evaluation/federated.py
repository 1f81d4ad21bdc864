"""The encoder measured without collecting a label: heads from sums, scores from counts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedssl.evaluation.base import EvaluationData, Score
from fedssl.evaluation.classifier import ClassifierEvaluation
from fedssl.evaluation.converged import fit_converged_head
from fedssl.evaluation.linear import train_linear_head
from fedssl.evaluation.sites import (
    HeadSettings,
    Site,
    deal_like,
    draw_share,
    group_sites,
)
from fedssl.evaluation.sums import (
    DECAYS,
    Head,
    Standardized,
    Sums,
    choose_decay,
    choose_decay_alone,
)
from fedssl.networks.encoder import Encoder
from fedssl.networks.state import state_digest
from fedssl.seeding import derive_seed, generator_for

FROM_SUMS, BY_ROUNDS = "head from sums", "head by rounds"


@dataclass(frozen=True)
class SiteScores:
    """How well a head does on the test images of all sites.

    Attributes:
        confusions: of each site, int64 (C, C): class by predicted class.
    """

    confusions: Mapping[int, np.ndarray]

    @property
    def top1(self) -> float:
        """The share of all test images that are classified correctly."""
        return share_correct(self.total)

    @property
    def total(self) -> np.ndarray:
        """The confusion matrix of all sites together."""
        return np.sum(list(self.confusions.values()), axis=0)

    def to_json(self) -> dict[str, Any]:
        """Give what is recorded: by class, by site, and their spread."""
        total = self.total
        seen = total.sum(axis=1) > 0
        by_class = np.diag(total)[seen] / total.sum(axis=1)[seen]
        tested = {site: each for site, each in self.confusions.items() if each.sum()}
        by_site = {site: share_correct(each) for site, each in tested.items()}
        values = list(by_site.values())
        return {
            "balanced": float(by_class.mean()),
            "by_class": dict(zip(np.flatnonzero(seen).tolist(), by_class.tolist(), strict=True)),
            "by_site": by_site,
            "spread_over_sites": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            "confusion": total.tolist(),
        }


@dataclass(frozen=True)
class FederatedEvaluation(ClassifierEvaluation):
    """Labels stay at the sites: two heads, and the score, from what these add up.

    The labels of `label_fraction` are drawn at each site; the test images of a simulation
    are dealt out by the classes that a site holds. Beside these stand the heads that all
    drawn labels in one place give.

    Attributes:
        min_images: of a class at a site, for its sum to leave it.
        folds: of sites at most, which choose the weight decay of the head from sums.
    """

    mode = "federated"
    title = "Evaluation at the sites"
    needs_partitions = True

    min_images: int
    folds: int

    def run(self, name: str, encoder: Encoder, data: EvaluationData) -> list[Score]:
        """Score the heads of each draw.

        Raises:
            RuntimeError: the encoder changed, which would be a defect.
        """
        digest = state_digest(encoder)
        draws = [self.draw(data, seed) for seed in data.seeds]
        rows = np.unique(np.concatenate([drawn for each in draws for drawn in each]))
        features = data.features(encoder, data.train.pixels[rows])
        test = data.features(encoder, data.test.pixels)
        scores: dict[str, list[SiteScores]] = {FROM_SUMS: [], BY_ROUNDS: []}
        central: dict[str, list[float]] = {}
        for seed, draw in zip(data.seeds, draws, strict=True):
            banks = [features[np.searchsorted(rows, drawn)] for drawn in draw]
            sites = self.make_sites(banks, draw, test, data)
            standardized, head = fit_from_sums(sites, self.folds)
            scores[FROM_SUMS].append(score_sites(sites, head))
            settings = HeadSettings(
                self.epochs, self.batch_size, self.learning_rate, self.weight_decay
            )
            trained = train_by_rounds(sites, standardized, settings, seed)
            scores[BY_ROUNDS].append(score_sites(sites, trained))
            bank = np.concatenate([site.features for site in sites.values()])
            labels = np.concatenate([site.labels for site in sites.values()])
            in_one_place = {
                "linear head": train_linear_head(bank, labels, data.num_classes, self, seed),
                "converged head": fit_converged_head(bank, labels, seed),
            }
            for what, predict in in_one_place.items():
                central.setdefault(what, []).append(data.top1(predict(test)))
        if state_digest(encoder) != digest:
            raise RuntimeError("the frozen encoder changed during the evaluation")
        return [
            *(
                Score(
                    name,
                    what,
                    [each.top1 for each in found],
                    encoder_sha256=digest,
                    sites=[each.to_json() for each in found],
                )
                for what, found in scores.items()
            ),
            *(
                Score(name, f"{what}, labels in one place", values, encoder_sha256=digest)
                for what, values in central.items()
            ),
        ]

    def count_labelled(self, data: EvaluationData) -> int:
        """Count the labels that all sites draw together."""
        return sum(map(len, self.draw(data, data.seeds[0])))

    def draw(self, data: EvaluationData, seed: int) -> list[np.ndarray]:
        """Draw at each site the rows whose labels may be seen, int64."""
        labels = data.train.labels
        return [
            rows[draw_share(labels[rows], self.label_fraction, derive_seed(seed, "labels", number))]
            for number, rows in enumerate(data.partitions)
        ]

    def make_sites(
        self,
        banks: Sequence[np.ndarray],
        draw: Sequence[np.ndarray],
        test: np.ndarray,
        data: EvaluationData,
    ) -> dict[int, Site]:
        """Give each partition, by its number, its labelled features and its test features.

        Args:
            banks: features of each site's drawn rows.
            test: features of all test images, (M, D).
        """
        labels, test_labels = data.train.labels, data.test.labels
        dealt = deal_like(data.partitions, labels, test_labels, data.seeds[0])
        return {
            number: Site.of(
                bank,
                labels[drawn],
                test[tested],
                test_labels[tested],
                data.num_classes,
                self.min_images,
            )
            for number, (bank, drawn, tested) in enumerate(zip(banks, draw, dealt, strict=True))
        }


def fit_from_sums(sites: Mapping[int, Site], folds: int) -> tuple[Standardized, Head]:
    """Fit the head on the sums of all sites, with the decay that folds of sites choose.

    A fold's sites count what heads from the other sites' sums classify correctly. Where
    sites can't stand in for each other, one alone or classes that only one fold has,
    generalized cross-validation chooses, which needs nothing but the sums.

    Raises:
        ValueError: no site has labelled images.
    """
    sums = {number: site.sums() for number, site in sites.items()}
    if not sums:
        raise ValueError("there are no labelled images")
    total = add(sums.values())
    standardized = Standardized.of(total)
    groups = group_sites({number: each.images for number, each in sums.items()}, folds)
    parts = [add([sums[number] for number in group]) for group in groups]
    if not can_stand_in(parts):
        return standardized, standardized.solve(choose_decay_alone(standardized))
    correct = np.zeros(len(DECAYS), dtype=np.int64)
    for group, part in zip(groups, parts, strict=True):
        others = Standardized.of(total.without(part))
        heads = [others.solve(decay) for decay in DECAYS]
        for number in group:
            correct += sites[number].count_correct(heads)
    return standardized, standardized.solve(choose_decay(correct))


def can_stand_in(parts: Sequence[Sums]) -> bool:
    """Tell whether every class of each fold is in another fold, too."""
    if len(parts) < 2:
        return False
    there = np.stack([part.counts > 0 for part in parts]).sum(axis=0)
    return bool((there != 1).all())


def train_by_rounds(
    sites: Mapping[int, Site], standardized: Standardized, settings: HeadSettings, seed: int
) -> Head:
    """Train a softmax head by FedAvg: an epoch at each site, then the mean by images.

    Args:
        standardized: gives mean and scale of the features of all sites.

    Returns:
        The head, on features as they are.
    """
    shape = standardized.products.shape
    head = Head(np.zeros(shape, np.float32), np.zeros(shape[1], np.float32))
    mean, scale = standardized.mean, standardized.scale
    filled = {number: site for number, site in sites.items() if len(site.labels)}
    shares = np.array([len(site.labels) for site in filled.values()]) / standardized.images
    for epoch in range(settings.epochs):
        trained = [
            site.train(
                head, mean, scale, settings, epoch, generator_for(seed, "head", epoch, number)
            )
            for number, site in filled.items()
        ]
        weights = np.tensordot(shares, np.stack([each.weight for each in trained]), axes=1)
        biases = np.tensordot(shares, np.stack([each.bias for each in trained]), axes=1)
        head = Head(weights.astype(np.float32), biases.astype(np.float32))
    weight = head.weight / scale[:, None]
    bias = head.bias - mean @ weight
    return Head(weight.astype(np.float32), bias.astype(np.float32))


def score_sites(sites: Mapping[int, Site], head: Head) -> SiteScores:
    """Let each site count its test images by class and predicted class."""
    return SiteScores({number: site.confusion(head) for number, site in sites.items()})


def add(sums: Iterable[Sums]) -> Sums:
    """Add up sums, at least one."""
    first, *others = sums
    return sum(others, first)


def share_correct(confusion: np.ndarray) -> float:
    """Give the share of the images on the diagonal of a confusion matrix."""
    return float(np.trace(confusion) / max(confusion.sum(), 1))
