"""What the logs of a run hold of a round: lines of a deployed run, and TensorBoard's curves."""

import logging
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter

from fedssl.runs.metrics import RoundMetrics, Where


def log_round(log: logging.Logger, metrics: RoundMetrics) -> None:
    """Write a round's numbers, failures and warnings; its nodes had their lines when they came."""
    numbers = metrics.texts(Where.LOG).items()
    told = ", ".join(f"{label} {text}" for label, text in numbers if text is not None)
    log.info("round %d: %s", metrics.round, told)
    for failure in metrics.failures:
        log.warning("  without %s: %s", failure.who, failure.reason)
    for warning in metrics.warnings:
        log.warning("  %s", warning)


class TensorboardWriter:
    """Writes what TensorBoard shows of each round into a run's directory."""

    def __init__(self, run_path: Path, purge_step: int) -> None:
        """Open the run's events.

        Args:
            purge_step: the next round; what an earlier part of the run wrote of it and
                of later ones is left out.
        """
        self._events = SummaryWriter(str(run_path), purge_step=purge_step)

    def __enter__(self) -> "TensorboardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._events.close()

    def write(self, metrics: RoundMetrics) -> None:
        """Write a round's curves, at once."""
        for tag, value in metrics.curves().items():
            self._events.add_scalar(tag, value, metrics.round)
        self._events.flush()
