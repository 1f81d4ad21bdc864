"""The curves of a run for TensorBoard."""

from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter

from fedssl.runs.metrics import RoundMetrics


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
