"""What an evaluation leaves in results.json: scores, and all that decided them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

TOP1 = "top-1"
TRAINED = "federated "  # and the name of the method: whose encoder a score is of
RANDOM = "random encoder"
AT_SITES, TUNED_AT_SITES = "federated", "federated_finetune"  # modes
FROM_SUMS, BY_ROUNDS = "head from sums", "head by rounds"  # at the sites
TUNED = "fine-tuned by rounds"
OWN_HEADS = "own head at each site"
UNRECORDED = {"_target_", "baselines", "feature_batch_size"}  # these decide no score


@dataclass(frozen=True)
class Score:
    """How well an encoder does by a method, once for every draw of labels.

    Attributes:
        encoder: whose it is, the first column of the table.
        method: what was put on it, the second column.
        top1: values, from 0 to 1; those of the metric if it is another one.
        encoder_sha256: of a frozen encoder, before and after.
        sites: for each draw what the sites of a federation tell beside it.
        head: weight (D, C) and bias (C,) of the first draw's linear head, where one can be
            used; results.json does not hold it.
        tuned: state of the encoder below that head, where it is not the run's own; likewise.
    """

    encoder: str
    method: str
    top1: list[float]
    metric: str = TOP1
    encoder_sha256: str | None = None
    sites: list[dict[str, Any]] | None = None
    head: tuple[np.ndarray, np.ndarray] | None = field(default=None, compare=False, repr=False)
    tuned: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    @property
    def mean(self) -> float:
        """The mean over the draws."""
        return float(np.mean(self.top1))

    @property
    def std(self) -> float | None:
        """The sample standard deviation over the draws, None for a single one."""
        return float(np.std(self.top1, ddof=1)) if len(self.top1) > 1 else None

    def to_json(self) -> dict[str, Any]:
        """Write it as a row of results.json."""
        row: dict[str, Any] = {"encoder": self.encoder, "method": self.method, "top1": self.top1}
        row |= {"mean": self.mean, "std": self.std}
        if self.metric != TOP1:
            row["metric"] = self.metric
        if self.encoder_sha256:
            row["encoder_sha256"] = self.encoder_sha256
        if self.sites:
            row["sites"] = self.sites
        return row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Score":
        """Read a row of results.json."""
        metric, digest = row.get("metric", TOP1), row.get("encoder_sha256")
        top1, sites = list(row["top1"]), row.get("sites")
        return cls(row["encoder"], row["method"], top1, metric, digest, sites)


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
        privacy: of the encoder's training, where it was private: epsilon, delta, all that
            decided them, and what they do not cover.
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
    privacy: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Write it as an entry of results.json."""
        entry = asdict(self) | {"rows": [score.to_json() for score in self.rows]}
        if self.images is None:  # as before version 1.1
            del entry["images"], entry["own_images"]
        if self.privacy is None:
            del entry["privacy"]
        return entry

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Result":
        """Read an entry of results.json.

        Raises:
            TypeError: a field is missing or unknown.
        """
        return cls(**{**entry, "rows": [Score.from_json(row) for row in entry["rows"]]})
