"""Heads and scores of a federation, from what its sites answer."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from fedssl.runs.results import BY_ROUNDS, FROM_SUMS, OWN_HEADS, TUNED, Score
from fedssl.sites.site import Counts, HeadSettings, Sites, group_sites
from fedssl.sites.sums import (
    DECAYS,
    Head,
    Judgement,
    Standardized,
    Sums,
    choose_decay_alone,
)


@dataclass(frozen=True)
class SiteScores:
    """A head, and how well it does on the test images of all sites.

    Attributes:
        head: None where each site has its own.
        sites: what each counted, by its number.
        left_out: classes that each left out, for want of labelled images.
    """

    head: Head | None
    sites: Mapping[int, Counts]
    left_out: Mapping[int, int] = field(default_factory=dict)

    @property
    def total(self) -> Counts:
        """The counts of all sites together."""
        first, *others = self.sites.values()
        return sum(others, first)

    @property
    def top1(self) -> float:
        """The share of all test images that are classified correctly."""
        return share_correct(self.total.confusion)

    def to_json(self) -> dict[str, Any]:
        """Give what is recorded: by class, by site, their spread, and the calibration error.

        The last is the mean distance between confidence and share of right answers, over bins
        of confidence, each with the weight of its images (https://arxiv.org/abs/1706.04599).
        """
        total, reliability = self.total.confusion, self.total.reliability
        seen = total.sum(axis=1) > 0
        by_class = np.diag(total)[seen] / total.sum(axis=1)[seen]
        tested = {site: each.confusion for site, each in self.sites.items()}
        by_site = {site: share_correct(each) for site, each in tested.items() if each.sum()}
        values = list(by_site.values())
        apart = np.abs(reliability[:, 1] - reliability[:, 2]).sum()
        return {
            "balanced": float(by_class.mean()),
            "by_class": dict(zip(np.flatnonzero(seen).tolist(), by_class.tolist(), strict=True)),
            "by_site": by_site,
            "spread_over_sites": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            "calibration_error": float(apart / reliability[:, 0].sum()),
            "confusion": total.tolist(),
            "left_out": {site: count for site, count in self.left_out.items() if count},
        }


def score_heads(sites: Sites, folds: int, settings: HeadSettings) -> dict[str, SiteScores]:
    """Score the head from sums, the one by rounds, and each site's own.

    Raises:
        ValueError: no site has labelled images, or none has test images.
    """
    standardized, head = fit_from_sums(sites, folds)
    trained = train_by_rounds(sites, standardized, settings)
    shared = dict(zip((FROM_SUMS, BY_ROUNDS), score(sites, [head, trained]), strict=True))
    return {**shared, OWN_HEADS: score_own(sites, head)}


def score_tuned(sites: Sites, head: Head) -> dict[str, SiteScores]:
    """Score the tuned head, and each site's own on the tuned encoder's features.

    Raises:
        ValueError: no site has test images.
    """
    (shared,) = score(sites, [head])
    return {TUNED: shared, f"tuned encoder, {OWN_HEADS}": score_own(sites, head)}


def to_score(
    name: str,
    what: str,
    draws: Sequence[SiteScores],
    digest: str | None = None,
    tuned: Mapping[str, Tensor] | None = None,
) -> Score:
    """Make a row of results.json.

    Args:
        name, digest: of the encoder; no digest of one that was tuned.
        draws: the scores of each draw of labels.
        tuned: state of the first draw's encoder, where it was.
    """
    values, told = [each.top1 for each in draws], [each.to_json() for each in draws]
    shared = draws[0].head
    head = None if shared is None else (shared.weight, shared.bias)
    return Score(name, what, values, encoder_sha256=digest, sites=told, head=head, tuned=tuned)


def fit_from_sums(sites: Sites, folds: int) -> tuple[Standardized, Head]:
    """Fit the head on the sums of all sites, with the decay that folds of sites choose.

    A fold's sites judge heads from the other sites' sums: how many labelled images they
    classify correctly, which chooses the decay, and by which temperature their softmax is
    least surprised, which makes scores probabilities (https://arxiv.org/abs/1706.04599). Where
    sites can't stand in for each other, one alone or classes that only one fold has,
    generalized cross-validation chooses the decay, which needs nothing but the sums, and the
    temperature is that of the labelled images themselves.

    Raises:
        ValueError: no site has labelled images.
    """
    sums = sites.sums()
    if not sums:
        raise ValueError("there are no labelled images")
    total = add(sums.values())
    standardized = Standardized.of(total)
    groups = group_sites({number: each.images for number, each in sums.items()}, folds)
    parts = [add([sums[number] for number in group]) for group in groups]
    if not can_stand_in(parts):
        head = standardized.solve(choose_decay_alone(standardized))
        judged = sites.judge({number: [head] for number, each in sums.items() if each.images})
        return standardized, head.sharpened(gather(judged).temperature(0))
    heads: dict[int, list[Head]] = {}
    for group, part in zip(groups, parts, strict=True):
        others = Standardized.of(total.without(part))
        solved = [others.solve(decay) for decay in DECAYS]
        heads |= dict.fromkeys(group, solved)
    judgement = gather(sites.judge(heads))
    best = judgement.best()
    return standardized, standardized.solve(DECAYS[best]).sharpened(judgement.temperature(best))


def gather(judged: Mapping[int, Judgement]) -> Judgement:
    """Add up what sites say.

    Raises:
        ValueError: no site says anything.
    """
    if not judged:
        raise ValueError("no site has judged a head")
    first, *others = judged.values()
    return sum(others, first)


def can_stand_in(parts: Sequence[Sums]) -> bool:
    """Tell whether every class of each fold is in another fold, too."""
    if len(parts) < 2:
        return False
    there = np.stack([part.counts > 0 for part in parts]).sum(axis=0)
    return bool((there != 1).all())


def train_by_rounds(sites: Sites, standardized: Standardized, settings: HeadSettings) -> Head:
    """Train a softmax head by FedAvg: an epoch at each site, then the mean by images.

    Args:
        standardized: gives mean and scale of the features of all sites.

    Returns:
        The head, on features as they are.

    Raises:
        ValueError: in an epoch no site answered.
    """
    shape = standardized.products.shape
    head = Head(np.zeros(shape, np.float32), np.zeros(shape[1], np.float32))
    mean, scale = standardized.mean, standardized.scale
    for epoch in range(settings.epochs):
        trained = list(sites.train(head, mean, scale, settings, epoch).values())
        if not trained:
            raise ValueError("no site has trained a head")
        images = np.array([each.images for each in trained], dtype=np.float64)
        shares = images / images.sum()
        weight = np.tensordot(shares, np.stack([each.head.weight for each in trained]), axes=1)
        bias = np.tensordot(shares, np.stack([each.head.bias for each in trained]), axes=1)
        head = Head(weight.astype(np.float32), bias.astype(np.float32))
    weight = head.weight / scale[:, None]
    bias = head.bias - mean @ weight
    return Head(weight.astype(np.float32), bias.astype(np.float32))


def score(sites: Sites, heads: Sequence[Head]) -> list[SiteScores]:
    """Let each site count its test images by class and predicted class of each head.

    Raises:
        ValueError: no site has test images.
    """
    told = sites.test(heads)
    if not any(tested.confusion.sum() for each in told.values() for tested in each):
        raise ValueError("no site has labelled test images")
    left_out = sites.left_out()
    return [
        SiteScores(head, {site: each[place] for site, each in told.items()}, left_out)
        for place, head in enumerate(heads)
    ]


def score_own(sites: Sites, shared: Head) -> SiteScores:
    """Let each site score its own head.

    Args:
        shared: for sites without labelled images.

    Raises:
        ValueError: no site has test images.
    """
    told = sites.test_own(shared)
    if not any(tested.confusion.sum() for tested in told.values()):
        raise ValueError("no site has labelled test images")
    return SiteScores(None, told, sites.left_out())


def add(sums: Iterable[Sums]) -> Sums:
    """Add up sums, at least one."""
    first, *others = sums
    return sum(others, first)


def share_correct(confusion: np.ndarray) -> float:
    """Give the share of the images on the diagonal of a confusion matrix."""
    return float(np.trace(confusion) / max(confusion.sum(), 1))
