"""What a person sees in the terminal: the opening lines, the rounds, the results."""

import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from tqdm import tqdm

from fedssl.errors import WARNING
from fedssl.terminal import is_live, paint

EVALUATIONS = {
    "linear": "Linear evaluation",
    "finetune": "Fine-tuning",
    "supervised": "Supervised training from scratch",
}
TRAIN_SHARE = 0.9  # of a round's time, until the first round tells


class Waiting:
    """A line in a terminal that tells every second how long something takes; nothing in files."""

    def __init__(self, what: str, quiet: bool = False, total: int | None = None) -> None:
        """Show the line.

        Args:
            total: steps of the work, for a bar; None: only the time so far.
        """
        self.what, self.began = what, time.monotonic()
        self.bar = tqdm(
            total=total,
            bar_format=self.describe(),
            disable=quiet or not is_live(sys.stdout),
            file=sys.stdout,
            leave=False,
            dynamic_ncols=True,
        )
        self.ended = threading.Event()
        self.clock = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> "Waiting":
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
        if self.clock.is_alive():
            self.clock.join()
        self.bar.close()

    def _tick(self) -> None:
        while not self.ended.wait(timeout=1):
            self.refresh()

    def refresh(self) -> None:
        """Write the line anew."""
        self.bar.bar_format = self.describe()
        self.bar.refresh()

    def describe(self) -> str:
        """Say what is going on; `{bar}` is where tqdm draws its bar."""
        return f"  {self.what}, {_clock(time.monotonic() - self.began)} so far"


class RoundProgress(Waiting):
    """A line for every finished round and, in a terminal, a bar with clients and time left."""

    def __init__(self, num_rounds: int, done: int = 0, quiet: bool = False) -> None:
        """Start a display.

        Args:
            done: rounds of an earlier part of the run.
            quiet: show only failures and warnings, on the standard error stream.
        """
        self.num_rounds, self.done, self.earlier, self.quiet = num_rounds, done, done, quiet
        self.train_share = TRAIN_SHARE
        self.ends: float | None = None  # on the monotonic clock, as far as can be told
        super().__init__("starting", quiet, num_rounds)
        self.bar.n = done

    def __enter__(self) -> "RoundProgress":
        if not self.quiet:
            tqdm.write(
                f"  {'round':>7}  {'train loss':>10}  {'eval loss':>9}  {'rank':>5}  {'kNN':>7}  "
                f"{'time':>8}"
            )
        super().__enter__()
        return self

    def describe(self) -> str:
        """Say which round it is, how many clients are done, how fast, and the time left."""
        place = f"{min(self.done + 1, self.num_rounds)}/{self.num_rounds}"
        now = time.monotonic()
        so_far = f"{_clock(now - self.began)} so far"
        time_left = f"{_clock(self.ends - now)} left" if self.ends else so_far
        return f"  round {place} |{{bar:14}}| {self.what}, {time_left}"  # 80 columns hold it

    def follow(self, standing: Mapping[str, Any]) -> None:
        """Move the bar as clients answer.

        Args:
            standing: of the round, as `server.OnAnswer` has it.
        """
        answered, asked, pace = (standing[k] for k in ("answered", "asked", "images_per_second"))
        part = answered / max(asked, 1)
        if standing["phase"] == "train":
            self.what, share = f"{answered}/{asked} clients trained", part * self.train_share
        else:
            self.what = f"{answered}/{asked} clients evaluated"
            share = self.train_share + part * (1 - self.train_share)
        if pace:
            self.what += f", {pace:,.0f} images/s"
        self._move(self.done + share)

    def show(self, row: Mapping[str, Any]) -> None:
        """Print a round's metrics line and what went wrong, and move the bar."""
        place = f"{row['round']}/{self.num_rounds}"
        if not self.quiet:
            tqdm.write(
                f"  {place:>7}  {row['train_loss']:10.3f}  {_cell(row['eval_loss'], '9.3f')}  "
                f"{_cell(row['effective_rank'], '5.1f')}  {_cell(row['knn'], '7.1%')}  "
                f"{row['seconds']:6.1f} s"
            )
        margin = f"round {row['round']}: " if self.quiet else " " * 11
        for failure in row["failures"]:
            line = f"client {failure['partition']} failed: {failure['reason']}"
            _write(margin + line, "error", self.quiet)
        for warning in row["warnings"]:
            _write(f"{margin}{WARNING}{warning}", "warning", self.quiet)
        sys.stdout.flush()
        self.train_share = row["seconds_train"] / row["seconds"]
        self.done = row["round"]
        self.what = "starting" if self.done < self.num_rounds else "finishing"
        self._move(self.done)

    def _move(self, rounds: float) -> None:
        """Put the bar at so many rounds; foretell the end from this run's pace."""
        now = time.monotonic()
        if rounds == self.earlier:
            self.began = now  # the start of Ray and of the clients belongs to no round
        else:
            pace = (now - self.began) / (rounds - self.earlier)
            self.ends = now + pace * (self.num_rounds - rounds)
        self.bar.n = rounds
        self.refresh()


def make_report(quiet: bool) -> Callable[[str], None]:
    """Make a function that prints a line, or only warnings when `quiet`."""

    def report(line: str) -> None:
        if line.startswith(WARNING):
            _write(line, "warning", quiet)
        elif not quiet:
            print(line)

    return report


def _write(line: str, style: str, quiet: bool) -> None:
    """Write a styled line: among the others, or where quiet programs complain."""
    stream = sys.stderr if quiet else sys.stdout
    tqdm.write(paint(line, style, stream), file=stream)


def _clock(seconds: float) -> str:
    """Write a duration, at least 0, as tqdm does: 0:05 as 00:05."""
    return tqdm.format_interval(max(0, round(seconds)))


def _cell(value: float | None, form: str) -> str:
    """Write a number, or a dash as wide."""
    return format(value, form) if value is not None else "-".rjust(int(form.split(".")[0]))


def evaluation_title(result: Mapping[str, Any]) -> str:
    """Say in two lines how an evaluation was made."""
    protocol, count = result["protocol"], result["protocol"]["seeds"]
    title = EVALUATIONS[result["mode"]]
    return (
        f"{title}: {100 * protocol['label_fraction']:g} % of the labels "
        f"({result['labelled_images']:,}), {protocol['epochs']} epochs, {count} "
        f"{'seeds' if count > 1 else 'seed'},\ntop-1 on all {result['test_images']:,} test images"
    )


def top1(row: Mapping[str, Any]) -> str:
    """Write a row's accuracy in percent: its mean, and the spread over the seeds."""
    spread = f" ± {100 * row['std']:.1f}" if row["std"] is not None else ""
    return f"{100 * row['mean']:.1f}{spread} %"


def print_results(result: Mapping[str, Any]) -> None:
    """Print the table of an evaluation."""
    print(evaluation_title(result))
    for place, row in enumerate(result["rows"]):
        line = f"  {row['encoder']:17} {row['method']:20} {top1(row):>13}"
        print(paint(line, "strong", sys.stdout) if place == 0 else line)
