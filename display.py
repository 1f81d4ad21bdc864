"""What a person sees in the terminal: the opening lines, the rounds, the results."""

import sys
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from tqdm import tqdm


class RoundProgress:
    """A line for every finished round and, in a terminal, a bar with the time left."""

    def __init__(self, num_rounds: int, done: int = 0) -> None:
        """Start a display.

        Args:
            done: rounds of an earlier part of the run.
        """
        self.num_rounds = num_rounds
        self.bar = tqdm(
            total=num_rounds,
            initial=done,
            desc="  training",
            bar_format="{desc} |{bar:24}| {n_fmt}/{total_fmt} rounds, {elapsed} so far, "
            "{remaining} left",
            disable=not sys.stdout.isatty(),
            file=sys.stdout,
            leave=False,
        )
        self.ended = threading.Event()
        self.clock = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> "RoundProgress":
        tqdm.write(
            f"  {'round':>7}  {'train loss':>10}  {'eval loss':>9}  {'rank':>5}  {'kNN':>7}  "
            f"{'time':>8}"
        )
        if not self.bar.disable:
            self.clock.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.ended.set()
        self.bar.close()

    def _tick(self) -> None:
        """Move the bar's clock every second, so that a long round is seen to go on."""
        while not self.ended.wait(timeout=1):
            self.bar.refresh()

    def show(self, row: Mapping[str, Any]) -> None:
        """Print a round's metrics line and move the bar."""
        place = f"{row['round']}/{self.num_rounds}"
        tqdm.write(
            f"  {place:>7}  {row['train_loss']:10.3f}  {_cell(row['eval_loss'], '9.3f')}  "
            f"{_cell(row['effective_rank'], '5.1f')}  {_cell(row['knn'], '7.1%')}  "
            f"{row['seconds']:6.1f} s"
        )
        for failure in row["failures"]:
            tqdm.write(f"           client {failure['partition']} failed: {failure['reason']}")
        for warning in row["warnings"]:
            tqdm.write(f"           warning: {warning}")
        sys.stdout.flush()
        self.bar.update()


def _cell(value: float | None, form: str) -> str:
    """Write a number, or a dash as wide."""
    return format(value, form) if value is not None else "-".rjust(int(form.split(".")[0]))


def evaluation_title(result: Mapping[str, Any]) -> str:
    """Say in a line how an evaluation was made."""
    protocol, count = result["protocol"], result["protocol"]["seeds"]
    title = "Linear evaluation" if result["mode"] == "linear" else "Fine-tuning"
    return (
        f"{title}: {100 * protocol['label_fraction']:g} % of the labels "
        f"({result['labelled_images']:,}), {protocol['epochs']} epochs, top-1 on all "
        f"{result['test_images']:,} test images, {count} {'seeds' if count > 1 else 'seed'}"
    )


def top1(row: Mapping[str, Any]) -> str:
    """Write a row's accuracy in percent: its mean, and the spread over the seeds."""
    spread = f" ± {100 * row['std']:.1f}" if row["std"] is not None else ""
    return f"{100 * row['mean']:.1f}{spread} %"


def print_results(result: Mapping[str, Any]) -> None:
    """Print the table of an evaluation."""
    print(f"\n{evaluation_title(result)}")
    for row in result["rows"]:
        print(f"  {row['encoder']:17} {row['method']:20} {top1(row):>13}")
