"""One site of a federation that holds labelled images: what it answers, and what it keeps.

What leaves a site is sums over many images (`Sums`), counts, and weights of a linear
head; never an image, the features of one, or the name of a file.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator

from fedssl.data.sources.base import NO_LABEL
from fedssl.seeding import derive_seed, generator_for
from fedssl.sites.sums import (
    BINS,
    Head,
    Judgement,
    Standardized,
    Sums,
    add_up,
    choose_decay_alone,
    leave_out_rare,
)


@dataclass(frozen=True)
class HeadSettings:
    """How a softmax head is trained by rounds.

    Attributes:
        epochs: rounds, each a pass over the labelled images of each site.
        batch_size: labelled images per step.
        learning_rate: of the first round; it falls to zero along a cosine.
        weight_decay: of the head.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float

    def rate(self, epoch: int) -> float:
        """Give the rate of an epoch, counted from 0."""
        return float(self.learning_rate * (1 + np.cos(np.pi * epoch / self.epochs)) / 2)


@dataclass(frozen=True)
class TuneSettings:
    """How an encoder is tuned together with its head.

    Attributes:
        rounds: of FedAvg.
        epochs: passes over the labelled images of each site in a round.
        batch_size: labelled images per step.
        learning_rate, weight_decay: of the head.
        encoder_learning_rate: of the encoder, which has no weight decay. Both rates fall to
            zero along a cosine over all rounds.
    """

    rounds: int
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    encoder_learning_rate: float

    def rate_factor(self, round_number: int, epoch: int) -> float:
        """Give the share of the rates in an epoch of a round, both counted from 0."""
        progress = (round_number + epoch / self.epochs) / self.rounds
        return float((1 + np.cos(np.pi * progress)) / 2)


@dataclass(frozen=True)
class Site:
    """The features of a site's labelled images, by one frozen encoder.

    Attributes:
        features: float32 (N, D) of those whose labels are drawn, N may be 0.
        labels: int64 (N,), from 0 to num_classes - 1.
        test_features, test_labels: the same of those that are scored, (M, D) and (M,).
        left_out: classes that have too few images at this site to add up.
    """

    features: np.ndarray
    labels: np.ndarray
    test_features: np.ndarray
    test_labels: np.ndarray
    num_classes: int
    left_out: Sequence[int] = ()

    @classmethod
    def of(
        cls,
        features: np.ndarray,
        labels: np.ndarray,
        test_features: np.ndarray,
        test_labels: np.ndarray,
        num_classes: int,
        min_images: int,
    ) -> "Site":
        """Leave out what has no label, and of the first kind the classes with too few images.

        Args:
            min_images: of a class; of fewer the sum could be a person's picture.
        """
        known, tested = np.flatnonzero(labels != NO_LABEL), np.flatnonzero(test_labels != NO_LABEL)
        features, labels = features[known], labels[known]
        rows, rare = leave_out_rare(labels, num_classes, min_images)
        test = test_features[tested], test_labels[tested]
        return cls(features[rows], labels[rows], *test, num_classes, tuple(rare.tolist()))

    def sums(self) -> Sums:
        """Add up the labelled features."""
        return add_up(self.features, self.labels, self.num_classes)

    def judge(self, heads: Sequence[Head]) -> Judgement:
        """Judge heads by the labelled images."""
        return Judgement.of(heads, self.features, self.labels)

    def own_head(self) -> Head | None:
        """Fit a head on the labelled images of this site alone; None without any.

        It is the one from sums of a federation of this site only, and never leaves it.
        """
        if not len(self.labels):
            return None
        standardized = Standardized.of(self.sums())
        head = standardized.solve(choose_decay_alone(standardized))
        return head.sharpened(self.judge([head]).temperature(0))

    def test(self, heads: Sequence[Head]) -> list["Counts"]:
        """Count what each head makes of the test images."""
        return [
            Counts.of(head, self.test_features, self.test_labels, self.num_classes)
            for head in heads
        ]

    def train(
        self,
        head: Head,
        mean: np.ndarray,
        scale: np.ndarray,
        settings: HeadSettings,
        epoch: int,
        generator: Generator,
    ) -> Head:
        """Pass once over the labelled images by SGD, on standardized features.

        Args:
            head: to begin with, on standardized features.
            mean, scale: of the features of all sites, (D,).
            generator: on the CPU; decides the order.
        """
        weight = torch.from_numpy(head.weight.copy()).requires_grad_()
        bias = torch.from_numpy(head.bias.copy()).requires_grad_()
        rate, decay = settings.rate(epoch), settings.weight_decay
        optimizer = torch.optim.SGD([weight, bias], rate, momentum=0.9, weight_decay=decay)
        inputs = torch.from_numpy(((self.features - mean) / scale).astype(np.float32))
        targets = torch.from_numpy(self.labels)
        batches = max(1, -(-len(targets) // settings.batch_size))
        for rows in torch.randperm(len(targets), generator=generator).chunk(batches):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(inputs[rows] @ weight + bias, targets[rows]).backward()
            optimizer.step()
        return Head(weight.detach().numpy(), bias.detach().numpy())


@dataclass(frozen=True)
class Counts:
    """What a head makes of test images, in counts.

    Attributes:
        confusion: images by class and by predicted class, int64 (C, C).
        reliability: by confidence, the probability of the predicted class, in `BINS` equal
            steps: images, the sum of their confidence, and how many are right, float64 (BINS, 3).
    """

    confusion: np.ndarray
    reliability: np.ndarray

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.confusion + other.confusion, self.reliability + other.reliability)

    @classmethod
    def of(cls, head: Head, features: np.ndarray, labels: np.ndarray, classes: int) -> "Counts":
        """Count over test images, (M, D) and (M,), M may be 0."""
        confusion, reliability = np.zeros((classes, classes), np.int64), np.zeros((BINS, 3))
        if len(labels):
            chances = head.probabilities(features)
            predicted, confidence = chances.argmax(axis=1), chances.max(axis=1)
            np.add.at(confusion, (labels, predicted), 1)
            bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
            right = predicted == labels
            told = np.stack([np.ones(len(labels)), confidence, right], axis=1)
            np.add.at(reliability, bins, told)
        return cls(confusion, reliability)


class Trained(NamedTuple):
    """A head that a site trained, and the number of its labelled images."""

    head: Head
    images: int


class Sites(ABC):
    """All sites of a federation with one draw of labels, asked at the same time.

    Every answer is by the site's number; a site that fails is missing.
    """

    @abstractmethod
    def sums(self) -> dict[int, Sums]:
        """Ask for the sums over the labelled images."""

    @abstractmethod
    def judge(self, heads: Mapping[int, Sequence[Head]]) -> dict[int, Judgement]:
        """Ask sites what their labelled images say of some heads each."""

    @abstractmethod
    def train(
        self, head: Head, mean: np.ndarray, scale: np.ndarray, settings: HeadSettings, epoch: int
    ) -> dict[int, Trained]:
        """Ask the sites with labelled images to train a head, see `Site.train`."""

    @abstractmethod
    def test(self, heads: Sequence[Head]) -> dict[int, list[Counts]]:
        """Ask what each head makes of the test images."""

    @abstractmethod
    def test_own(self, shared: Head) -> dict[int, Counts]:
        """Ask what each site's own head makes of its test images.

        Args:
            shared: for sites without labelled images.
        """

    @abstractmethod
    def left_out(self) -> dict[int, int]:
        """Tell of each site how many classes it leaves out, for want of images."""


class LocalSites(Sites):
    """Sites whose features are all in this process, as in a simulation."""

    def __init__(self, sites: Mapping[int, Site], seed: int) -> None:
        """Take the sites.

        Args:
            seed: of the draw of labels.
        """
        self.sites, self.seed = dict(sites), seed

    def sums(self) -> dict[int, Sums]:
        """Add up at each site."""
        return {number: site.sums() for number, site in self.sites.items()}

    def judge(self, heads: Mapping[int, Sequence[Head]]) -> dict[int, Judgement]:
        """Judge at each site."""
        return {number: self.sites[number].judge(given) for number, given in heads.items()}

    def train(
        self, head: Head, mean: np.ndarray, scale: np.ndarray, settings: HeadSettings, epoch: int
    ) -> dict[int, Trained]:
        """Train at each site with labelled images."""
        given = head, mean, scale, settings, epoch
        return {
            number: Trained(
                site.train(*given, head_generator(self.seed, epoch, number)), len(site.labels)
            )
            for number, site in self.sites.items()
            if len(site.labels)
        }

    def test(self, heads: Sequence[Head]) -> dict[int, list[Counts]]:
        """Test at each site."""
        return {number: site.test(heads) for number, site in self.sites.items()}

    def test_own(self, shared: Head) -> dict[int, Counts]:
        """Test each site by its own head."""
        return {
            number: site.test([site.own_head() or shared])[0] for number, site in self.sites.items()
        }

    def left_out(self) -> dict[int, int]:
        """Count at each site."""
        return {number: len(site.left_out) for number, site in self.sites.items()}


def head_generator(seed: int, epoch: int, site: int) -> Generator:
    """Decide the order of a site's labelled images in an epoch of the head by rounds."""
    return generator_for(seed, "head", epoch, site)


def draw_at_site(labels: np.ndarray, fraction: float, seed: int, site: int) -> np.ndarray:
    """Draw the rows of a site whose labels may be seen, see `draw_share`.

    Args:
        seed: of the draw.
    """
    return draw_share(labels, fraction, derive_seed(seed, "labels", site))


def draw_share(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Draw a share of a site's labels, each class with nearly its own share of it.

    Unlike `draw_labelled` it never fails: a site may have few images, or none, of a class.

    Args:
        labels: int64 (N,).
        fraction: above 0 and at most 1.

    Returns:
        Ascending rows, int64.
    """
    rows = np.flatnonzero(labels != NO_LABEL)
    random = np.random.default_rng(seed)
    order = random.permutation(len(rows))
    by_class = rows[order][np.argsort(labels[rows[order]], kind="stable")]
    count = round(fraction * len(by_class))
    places = (np.arange(count) + random.random()) * len(by_class) / max(count, 1)
    return np.sort(by_class[places.astype(np.int64)])


def deal_like(
    parts: Sequence[np.ndarray], labels: np.ndarray, test_labels: np.ndarray, seed: int
) -> list[np.ndarray]:
    """Deal test images out so that each site has those of its classes, in its shares.

    Args:
        parts: rows of each site's training images.
        labels, test_labels: int64, of all training and test images.

    Returns:
        For each site the rows of its test images, int64; every labelled one is somewhere.
    """
    random = np.random.default_rng(seed)
    dealt: list[list[np.ndarray]] = [[] for _ in parts]
    for label in np.unique(test_labels[test_labels != NO_LABEL]):
        rows = random.permutation(np.flatnonzero(test_labels == label))
        counts = np.array([(labels[part] == label).sum() for part in parts], dtype=np.float64)
        counts = counts if counts.any() else np.ones(len(parts))
        cuts = np.rint(np.cumsum(counts) / counts.sum() * len(rows)).astype(np.int64)
        for site, piece in zip(dealt, np.split(rows, cuts[:-1]), strict=True):
            site.append(piece)
    empty = np.array([], dtype=np.int64)
    return [np.sort(np.concatenate([empty, *pieces])) for pieces in dealt]


def group_sites(sizes: Mapping[int, int], folds: int) -> list[list[int]]:
    """Put the sites into folds of about as many images, the largest first.

    Args:
        sizes: labelled images of each site.
        folds: at most so many.

    Returns:
        The sites of each fold; those without images are in none.
    """
    filled = sorted((site for site, size in sizes.items() if size), key=lambda s: (-sizes[s], s))
    groups: list[list[int]] = [[] for _ in range(min(folds, len(filled)))]
    for site in filled:
        min(groups, key=lambda group: sum(sizes[each] for each in group)).append(site)
    return groups
