"""The server's side of an evaluation at the sites."""

from dataclasses import dataclass

from fedssl.networks.encoder import Encoder
from fedssl.networks.state import state_digest
from fedssl.runs.results import BY_ROUNDS, FROM_SUMS, Score
from fedssl.sites.heads import SiteScores, score_heads, to_score
from fedssl.sites.remote import Asking, AtSites, Classes, RemoteSites, spread_encoder


@dataclass(frozen=True)
class Counted:
    """How many images took part: labelled ones of the first draw, and test images."""

    labelled: int
    tested: int


def evaluate_encoder(
    asking: Asking, name: str, encoder: Encoder, classes: Classes, settings: AtSites
) -> tuple[list[Score], Counted]:
    """Score both heads on an encoder, at all sites that answer.

    Args:
        name: of the encoder, for the scores.

    Raises:
        RuntimeError: no site has labelled images, or none has test images.
    """
    state = {key: value.detach().cpu() for key, value in encoder.state_dict().items()}
    counts = spread_encoder(asking, state, classes, settings)
    shape = encoder.feature_size, len(classes.keys)
    scores: dict[str, list[SiteScores]] = {FROM_SUMS: [], BY_ROUNDS: []}
    for draw, seed in enumerate(settings.seeds):
        sites = RemoteSites(asking, sorted(counts), draw, seed, *shape)
        try:
            found = score_heads(sites, settings.folds, settings.head)
        except ValueError as error:
            raise RuntimeError(f"{error}{describe_failures(asking)}") from error
        for what, each in found.items():
            scores[what].append(each)
    labelled, tested = (sum(each) for each in zip(*counts.values(), strict=True))
    digest = state_digest(encoder)
    rows = [to_score(name, what, found, digest) for what, found in scores.items()]
    return rows, Counted(labelled, tested)


def describe_failures(asking: Asking) -> str:
    """Name the sites that failed, and why, for the end of a message."""
    told = dict.fromkeys(f"{failure.who}: {failure.reason}" for failure in asking.failures)
    return f" ({'; '.join(told)})" if told else ""
