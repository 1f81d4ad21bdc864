"""The server's side of an evaluation at the sites."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from torch import Tensor

from fedssl.networks.encoder import Encoder
from fedssl.networks.state import state_digest
from fedssl.runs.results import FROM_SUMS, TUNED, Score
from fedssl.sites.heads import SiteScores, fit_from_sums, score, score_heads, score_tuned, to_score
from fedssl.sites.remote import (
    Asking,
    AtSites,
    Classes,
    RemoteSites,
    Told,
    spread_encoder,
    tune_remotely,
)
from fedssl.sites.site import HeadSettings, TuneSettings
from fedssl.sites.tuning import begin_with, take_apart, tune_by_rounds


class Evaluated(NamedTuple):
    """Scores, and how many images took part: labelled ones of the first draw, and test images."""

    scores: list[Score]
    labelled: int
    tested: int


def evaluate_encoder(
    asking: Asking,
    name: str,
    encoder: Encoder,
    classes: Classes,
    settings: AtSites,
    training: HeadSettings,
) -> Evaluated:
    """Score the heads on a frozen encoder, at all sites that answer.

    Args:
        name: of the encoder, for the scores.
        training: of the head by rounds.

    Raises:
        ValueError: no site has labelled images, or none has test images.
    """
    told = spread_encoder(asking, _state_of(encoder), classes, settings)
    scores: dict[str, list[SiteScores]] = {}
    taking_part: list[Told] = []
    for draw, seed in enumerate(settings.seeds):
        sites = RemoteSites(asking, told, draw, seed, encoder.feature_size, len(classes.keys))
        for what, found in score_heads(sites, settings.folds, training).items():
            scores.setdefault(what, []).append(found)
        taking_part = taking_part or [told[site] for site in sites.numbers]
    digest = state_digest(encoder)
    rows = [to_score(name, what, found, digest) for what, found in scores.items()]
    return Evaluated(rows, *_count(taking_part))


def tune_encoder(
    asking: Asking,
    name: str,
    encoder: Encoder,
    classes: Classes,
    settings: AtSites,
    training: TuneSettings,
) -> Evaluated:
    """Tune an encoder with its head at all sites that answer, and score both.

    Args: as of `evaluate_encoder`, whose errors it raises.
    """
    state, shape = _state_of(encoder), (encoder.feature_size, len(classes.keys))
    told = spread_encoder(asking, state, classes, settings)
    heads, frozen = [], []
    taking_part: list[Told] = []
    for draw, seed in enumerate(settings.seeds):
        sites = RemoteSites(asking, told, draw, seed, *shape)
        _, head = fit_from_sums(sites, settings.folds)
        heads.append(head)
        frozen += score(sites, [head])
        taking_part = taking_part or [told[site] for site in sites.numbers]
    scores: dict[str, list[SiteScores]] = {}
    first: Mapping[str, Tensor] = {}
    for seed, head in zip(settings.seeds, heads, strict=True):
        ask = partial(tune_remotely, asking, classes, settings, training, seed)
        tuned = tune_by_rounds(begin_with(state, head), training.rounds, ask)
        tuned_state, tuned_head = take_apart(tuned)
        again = spread_encoder(asking, tuned_state, classes, replace(settings, seeds=[seed]))
        sites = RemoteSites(asking, again, 0, seed, *shape)
        for what, found in score_tuned(sites, tuned_head).items():
            scores.setdefault(what, []).append(found)
        first = first or tuned_state
    scores[FROM_SUMS] = frozen
    rows = [
        to_score(name, what, found, tuned=first if what == TUNED else None)
        for what, found in scores.items()
    ]
    return Evaluated(rows, *_count(taking_part))


def _state_of(encoder: Encoder) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in encoder.state_dict().items()}


def _count(told: Sequence[Told]) -> tuple[int, int]:
    """Add up labelled and test images of sites."""
    return sum(each.labelled for each in told), sum(each.tested for each in told)


def describe_failures(asking: Asking) -> str:
    """Name the sites that failed, and why, for the end of a message."""
    told = dict.fromkeys(f"{failure.who}: {failure.reason}" for failure in asking.failures)
    return f" ({'; '.join(told)})" if told else ""
