"""An evaluation beside its baselines, and the record of it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fedssl.evaluation.base import TOP1, Evaluation, EvaluationData, Score
from fedssl.evaluation.pixels import score_raw_pixels
from fedssl.networks.encoder import Encoder

TRAINED = "federated "  # and the name of the method
RANDOM = "random encoder"
FROM_SCRATCH = "labels only"


@dataclass(frozen=True)
class Result:
    """An entry of results.json: scores, and all that decided them.

    Attributes:
        mode: of the evaluation.
        dataset: name of what it was evaluated on.
        images: names the content of its training images.
        own_images: whether the run was trained on just these.
        protocol: values of the evaluation.
        round: of the checkpoint.
        labelled_images: of each draw of labels.
        rows: the run's own scores first.
        seed: of the run.
        checkpoint: name of its file.
        precision: of the features, "float32" or "bfloat16".
        measured: when and with what, see `provenance`.
    """

    mode: str
    dataset: str
    protocol: Mapping[str, Any]
    round: int
    labelled_images: int
    test_images: int
    rows: list[Score]
    seed: int
    checkpoint: str
    precision: str
    measured: Mapping[str, Any]
    images: str | None = None
    own_images: bool = True

    def to_json(self) -> dict[str, Any]:
        """Write it as an entry of results.json."""
        entry = asdict(self) | {"rows": [score.to_json() for score in self.rows]}
        if self.images is None:  # as before version 1.1
            del entry["images"], entry["own_images"]
        return entry

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Result":
        """Read an entry of results.json.

        Raises:
            TypeError: a field is missing or unknown.
        """
        return cls(**{**entry, "rows": [Score.from_json(row) for row in entry["rows"]]})


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
