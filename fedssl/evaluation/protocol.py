"""An evaluation beside its baselines."""

from fedssl.evaluation.base import Evaluation, EvaluationData
from fedssl.evaluation.pixels import score_raw_pixels
from fedssl.networks.encoder import Encoder
from fedssl.runs.results import RANDOM, TOP1, TRAINED, Score

FROM_SCRATCH = "labels only"


def evaluate(
    evaluation: Evaluation,
    encoder: Encoder,
    random_encoder: Encoder,
    data: EvaluationData,
    method: str = "SimCLR",
) -> list[Score]:
    """Score a run's encoder and, if asked, a random one and the raw pixels.

    Args:
        encoder: as the run has trained it.
        random_encoder: the same network at random initialization.
        method: that it was trained by.

    Returns:
        The scores of the run first, those of the raw pixels last.
    """
    if evaluation.starts_from_scratch:
        scores = evaluation.run(FROM_SCRATCH, random_encoder, data)
    else:
        scores = evaluation.run(f"{TRAINED}{method}", encoder, data)
        if evaluation.baselines:
            scores += evaluation.run(RANDOM, random_encoder, data)
    if evaluation.baselines and scores[0].metric == TOP1:  # else there is nothing to compare
        scores.append(score_raw_pixels(data))
    return scores
