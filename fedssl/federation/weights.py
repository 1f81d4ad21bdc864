"""How much a client counts in the average: by the images that it says it has, or as any other."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median_low
from typing import Literal

from flwr.app import MetricRecord

from fedssl.federation.guards import Update
from fedssl.federation.messages import METRICS


@dataclass(frozen=True)
class Weighting:
    """What decides the weight of a client.

    Attributes:
        by: "images", as many as it says that it has, or "equal": 1.
        max_ratio: a weight is at most so many times the median of the round's; 0 for any. Of
            two clients the smaller number counts as the median.
    """

    by: Literal["images", "equal"] = "images"
    max_ratio: float = 10

    def weigh(self, counts: Sequence[int]) -> list[int]:
        """Give the weights of clients that say they have so many images each."""
        if self.by == "equal":
            return [1] * len(counts)
        if not self.max_ratio or not counts:
            return list(counts)
        limit = max(1, int(self.max_ratio * median_low(counts)))
        return [min(count, limit) for count in counts]

    def apply(self, updates: Sequence[Update]) -> list[Update]:
        """Set the weights of updates, also where strategies read them."""
        weights = self.weigh([update.num_examples for update in updates])
        for update, weight in zip(updates, weights, strict=True):
            if weight != update.num_examples:
                record = update.message.content.metric_records[METRICS]
                update.message.content[METRICS] = MetricRecord({**record, "num-examples": weight})
        return [
            replace(update, weight=weight) for update, weight in zip(updates, weights, strict=True)
        ]

    def bounds(self, update: Update) -> bool:
        """Tell whether an update counts for less than its images."""
        return self.by == "images" and update.weight < update.num_examples
