"""A linear head from sums alone: what sites add up of their labelled features, and its solution.

Ridge regression of one-hot labels on standardized features (Hoerl and Kennard,
https://doi.org/10.1080/00401706.1970.10488634) needs of the features x (D,) no more than
three sums: of x x', of x by class, and the number of images of each class. They add up
over sites, so the head equals that of all features in one place, whoever holds which.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

DECAYS = tuple(float(f"{decay:g}") for decay in np.logspace(0, -6, 13))
TEMPERATURES = (0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.3, 0.5, 1.0)  # of a ridge's scores
BINS = 10  # of confidence, for the reliability
ROUNDING = 1e-6  # share of the largest eigenvalue by which the smallest may lie below 0


@dataclass(frozen=True)
class Sums:
    """Sums over labelled images with features of D numbers and C classes.

    Attributes:
        counts: images of each class, int64 (C,).
        totals: the sum of each class's features, float64 (D, C).
        gram: the sum of x x' over all images, float64 (D, D).
    """

    counts: np.ndarray
    totals: np.ndarray
    gram: np.ndarray

    @property
    def images(self) -> int:
        """The number of images."""
        return int(self.counts.sum())

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.counts + other.counts, self.totals + other.totals, self.gram + other.gram)

    def without(self, other: "Sums") -> "Sums":
        """Take sums out that are part of these."""
        return Sums(self.counts - other.counts, self.totals - other.totals, self.gram - other.gram)

    def pack(self) -> dict[str, np.ndarray]:
        """Give the numbers that travel: D (D + 1) / 2 + D C floats of 8 bytes, and C counts."""
        triangle = self.gram[np.triu_indices(len(self.gram))]
        return {"counts": self.counts, "totals": self.totals, "gram": triangle}


@dataclass(frozen=True)
class Head:
    """A linear classifier: the class of the largest of `features @ weight + bias`.

    Attributes:
        weight: float32 (D, C).
        bias: float32 (C,).
    """

    weight: np.ndarray
    bias: np.ndarray

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Give the scores (N, C) of features (N, D)."""
        return np.asarray(features @ self.weight + self.bias)

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Classify features (N, D): classes, int64 (N,)."""
        return np.argmax(self.scores(features), axis=1)

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Give the softmax of the scores (N, C) of features (N, D)."""
        return torch.from_numpy(self.scores(features)).double().softmax(dim=1).numpy()

    def sharpened(self, temperature: float) -> "Head":
        """Divide the scores by a temperature, which changes no class, only probabilities."""
        return Head(
            (self.weight / temperature).astype(np.float32),
            (self.bias / temperature).astype(np.float32),
        )


def add_up(features: np.ndarray, labels: np.ndarray, num_classes: int) -> Sums:
    """Sum over labelled features.

    Args:
        features: (N, D), N may be 0.
        labels: int64 (N,), from 0 to num_classes - 1.
    """
    exact = features.astype(np.float64)
    one_hot = np.eye(num_classes)[labels]
    return Sums(np.bincount(labels, minlength=num_classes), exact.T @ one_hot, exact.T @ exact)


def leave_out_rare(
    labels: np.ndarray, num_classes: int, minimum: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find the images of classes that have enough images for their sum to be nobody's picture.

    Args:
        minimum: images of a class at least.

    Returns:
        Their rows, ascending, and the classes that are left out although they have images.
    """
    counts = np.bincount(labels, minlength=num_classes)
    rare = np.flatnonzero((counts > 0) & (counts < minimum))
    return np.flatnonzero(~np.isin(labels, rare)), rare


def unpack_sums(arrays: dict[str, np.ndarray], features: int, classes: int) -> Sums:
    """Read what a site sent, and make sure that it can be sums of features.

    Args:
        features, classes: D and C.

    Raises:
        ValueError: what is wrong, in words for people.
    """
    shapes = {"counts": (classes,), "totals": (features, classes)}
    shapes["gram"] = (features * (features + 1) // 2,)
    for name, shape in shapes.items():
        value = arrays.get(name)
        if value is None or value.shape != shape:
            found = "is missing" if value is None else f"has shape {value.shape}"
            raise ValueError(f"{name} {found} instead of {shape}")
        if not np.isfinite(value).all():
            raise ValueError(f"{name} holds numbers that are not finite")
    counts = arrays["counts"]
    if counts.dtype != np.int64 or (counts < 0).any():
        raise ValueError("counts are no numbers of images")
    gram = np.zeros((features, features))
    upper = np.triu_indices(features)
    gram[upper] = arrays["gram"]
    gram = gram + np.triu(gram, 1).T
    totals = arrays["totals"].astype(np.float64)
    if totals[:, counts == 0].any():
        raise ValueError("there are features of classes without images")
    # What is left around the mean of each class is a sum of squares, too.
    means = totals / np.maximum(counts, 1)
    around = np.linalg.eigvalsh(gram - means @ totals.T)
    if around[0] < -ROUNDING * max(abs(np.trace(gram)), 1e-12):
        raise ValueError("gram is no sum of squares (it has a negative eigenvalue)")
    return Sums(counts, totals, gram)


@dataclass(frozen=True)
class Standardized:
    """Sums of standardized features as eigenvectors: quick to solve for many decays.

    Attributes:
        images: N.
        mean, scale: of the features, (D,); the scale of a feature that never varies is 1.
        shares: of the classes, (C,).
        values, vectors: eigenvalues (D,) and eigenvectors (D, D) of the sum of z z'.
        products: the vectors' products with the sum of z (y - shares)', (D, C).
    """

    images: int
    mean: np.ndarray
    scale: np.ndarray
    shares: np.ndarray
    values: np.ndarray
    vectors: np.ndarray
    products: np.ndarray

    @classmethod
    def of(cls, sums: Sums) -> "Standardized":
        """Standardize sums.

        Raises:
            ValueError: there are no images.
        """
        count = sums.images
        if not count:
            raise ValueError("there are no labelled images")
        mean, shares = sums.totals.sum(axis=1) / count, sums.counts / count
        scatter = sums.gram - count * np.outer(mean, mean)
        variance = np.diag(scatter) / count
        varies = variance > 1e-12 * np.maximum(np.diag(sums.gram) / count, 1e-12)
        scale = np.sqrt(np.where(varies, variance, 1.0))
        scatter /= np.outer(scale, scale)
        values, vectors = np.linalg.eigh((scatter + scatter.T) / 2)
        products = (sums.totals - np.outer(mean, sums.counts)) / scale[:, None]
        return cls(count, mean, scale, shares, values.clip(min=0), vectors, vectors.T @ products)

    def solve(self, decay: float) -> Head:
        """Minimize the mean of |z' W + b - y|^2 plus decay * |W|^2.

        Args:
            decay: above 0.
        """
        inner = self.products / (self.values + decay * self.images)[:, None]
        weight = (self.vectors @ inner) / self.scale[:, None]
        bias = self.shares - self.mean @ weight
        return Head(weight.astype(np.float32), bias.astype(np.float32))

    def generalized_cross_validation(self, decay: float) -> float:
        """Estimate the mean squared error on new images, from the sums alone.

        Golub, Heath and Wahba, https://doi.org/10.1080/00401706.1979.10489751.
        """
        shrunk = self.values + decay * self.images
        square = self.products**2
        explained = (square * ((2 * shrunk - self.values) / shrunk**2)[:, None]).sum()
        total = self.images * float((self.shares * (1 - self.shares)).sum())
        free = self.images - 1 - float((self.values / shrunk).sum())
        return self.images * (total - float(explained)) / max(free, 1e-9) ** 2


@dataclass(frozen=True)
class Judgement:
    """What labelled images say of several heads.

    Attributes:
        correct: images that each classifies correctly, int64 (heads,).
        surprise: the sum over images of -log of the softmax of the scores, divided by each of
            `TEMPERATURES`, at the true class, in nats, float64 (heads, temperatures).
    """

    correct: np.ndarray
    surprise: np.ndarray

    def __add__(self, other: "Judgement") -> "Judgement":
        return Judgement(self.correct + other.correct, self.surprise + other.surprise)

    @classmethod
    def of(cls, heads: Sequence[Head], features: np.ndarray, labels: np.ndarray) -> "Judgement":
        """Judge heads by labelled features (N, D)."""
        correct, surprise = [], []
        for head in heads:
            scores = torch.from_numpy(head.scores(features)).double()
            truth = torch.from_numpy(labels)
            correct.append(int((scores.argmax(dim=1) == truth).sum()))
            surprise.append(
                [
                    float(F.cross_entropy(scores / temperature, truth, reduction="sum"))
                    for temperature in TEMPERATURES
                ]
            )
        return cls(np.array(correct, dtype=np.int64), np.array(surprise))

    def best(self, decays: Sequence[float] = DECAYS) -> int:
        """Choose the head that classifies most images correctly; of equals that of most decay."""
        order = np.argsort(decays)[::-1]
        return int(order[np.argmax(self.correct[order])])

    def temperature(self, head: int) -> float:
        """Choose the temperature by which the images are least surprising to a head."""
        return float(TEMPERATURES[int(np.argmin(self.surprise[head]))])


def choose_decay_alone(standardized: Standardized, decays: Sequence[float] = DECAYS) -> float:
    """Choose the decay by generalized cross-validation, where no site can be left out."""
    return float(min(decays, key=standardized.generalized_cross_validation))
