"""What a person sees in the terminal: the opening lines, the rounds, the results."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import fill, indent
from types import TracebackType
from typing import Any

from rich.bar import Bar
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from fedssl.errors import WARNING
from fedssl.runs.metrics import Progress, RoundMetrics, Shown, Where
from fedssl.terminal import can_rewrite, console_on, print_line

EVALUATIONS = {
    "linear": "Linear evaluation",
    "federated": "Evaluation at the sites",
    "federated_finetune": "Fine-tuning at the sites",
    "finetune": "Fine-tuning",
    "supervised": "Supervised training from scratch",
}
TRAIN_SHARE = 0.9  # of a round's time, until the first round tells
FRAMES_PER_SECOND = 4
BAR_WIDTH = 14  # 80 columns hold the line
DIGITS = 6  # of a number in the table of rounds, its unit not among them


class Waiting:
    """A line in a terminal that tells how long something takes; nothing in files."""

    def __init__(self, what: str, quiet: bool = False) -> None:
        """Prepare the line; it is there as long as the context."""
        self.what, self.began = what, time.monotonic()
        self.spinner = Spinner("dots")
        self.console = console_on(sys.stdout)
        self.visible = not quiet and can_rewrite(self.console)
        self.live = Live(  # draws the line at once, so the state is there before
            get_renderable=self.render,
            console=self.console,
            refresh_per_second=FRAMES_PER_SECOND,
            transient=True,
            redirect_stderr=sys.stderr.isatty(),  # a file keeps what is written to it
        )

    def __enter__(self) -> "Waiting":
        if self.visible:
            self.live.start(refresh=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.live.stop()

    def describe(self) -> str:
        """Say what is going on."""
        return f"{self.what}, {_clock(time.monotonic() - self.began)} so far"

    def render(self) -> Text:
        """Draw the line, as often as it is shown."""
        spinner = self.spinner.render(time.monotonic())
        assert isinstance(spinner, Text)  # one without a text of its own
        return _one_line("  ", spinner, f" {self.describe()}")


class RoundProgress(Waiting):
    """A line for every finished round and, in a terminal, a bar with clients and time left."""

    def __init__(
        self, num_rounds: int, done: int = 0, quiet: bool = False, private: bool = False
    ) -> None:
        """Start a display.

        Args:
            done: rounds of an earlier part of the run.
            quiet: show only failures and warnings, on the standard error stream.
            private: show epsilon, too.
        """
        self.columns = [how for _, how in RoundMetrics.numbers(Where.TABLE, seldom=private)]
        self.num_rounds, self.done, self.earlier, self.quiet = num_rounds, done, done, quiet
        self.rounds = float(done)  # as far as the bar is
        self.train_share = TRAIN_SHARE
        self.ends: float | None = None  # on the monotonic clock, as far as can be told
        super().__init__("starting", quiet)

    def __enter__(self) -> "RoundProgress":
        if not self.quiet:
            labels = {how.label: how.label for how in self.columns}
            print_line(_table_line("round", self.columns, labels))
        super().__enter__()
        return self

    def describe(self) -> str:
        """Say how many clients are done, how fast, and the time left."""
        now = time.monotonic()
        so_far = f"{_clock(now - self.began)} so far"
        return f"{self.what}, {f'{_clock(self.ends - now)} left' if self.ends else so_far}"

    def render(self) -> Text:
        """Draw the bar, with the round before it and what is going on behind."""
        place = f"{min(self.done + 1, self.num_rounds)}/{self.num_rounds}"
        bar = Bar(self.num_rounds, 0, self.rounds, width=BAR_WIDTH)
        (drawn,) = self.console.render_lines(bar, pad=False)
        blocks = "".join(segment.text for segment in drawn)
        return _one_line(f"  round {place} |{blocks}| {self.describe()}")

    def follow(self, progress: Progress) -> None:
        """Move the bar as clients answer."""
        answered, asked = progress.answered, progress.asked
        part = answered / max(asked, 1)
        if progress.phase == "train":
            self.what, share = f"{answered}/{asked} clients trained", part * self.train_share
        else:
            self.what = f"{answered}/{asked} clients evaluated"
            share = self.train_share + part * (1 - self.train_share)
        if progress.images_per_second:
            self.what += f", {progress.images_per_second:,.0f} images/s"
        self._move(self.done + share)

    def show(self, metrics: RoundMetrics) -> None:
        """Print a round's line of the table and what went wrong, and move the bar."""
        if not self.quiet:
            place = f"{metrics.round}/{self.num_rounds}"
            print_line(_table_line(place, self.columns, metrics.texts(Where.TABLE)))
        margin = f"round {metrics.round}: " if self.quiet else " " * 11
        for failure in metrics.failures:
            line = f"{failure.who} failed: {failure.reason}"
            _complain(margin + line, "error", self.quiet)
        for warning in metrics.warnings:
            _complain(f"{margin}{WARNING}{warning}", "warning", self.quiet)
        if metrics.seconds and metrics.seconds_train is not None and metrics.eval_loss is not None:
            self.train_share = metrics.seconds_train / metrics.seconds
        self.done = metrics.round
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
        self.rounds = rounds
        if self.visible:
            self.live.refresh()


def _one_line(*parts: str | Text) -> Text:
    """Put parts together to a line that ends where the terminal does."""
    return Text.assemble(*parts, no_wrap=True, overflow="crop", end="")


def _table_line(place: str, columns: Sequence[Shown], texts: Mapping[str, str | None]) -> str:
    """Write a line of the table of rounds; a missing number is a dash as wide."""
    cells = [f"{texts[how.label] or '-':>{_width(how)}}" for how in columns]
    return "  ".join(["", f"{place:>7}", *cells])


def _width(how: Shown) -> int:
    return max(len(how.label), DIGITS + len(how.unit))


def make_report(quiet: bool) -> Callable[[str], None]:
    """Make a function that prints a line, or only warnings when `quiet`."""

    def report(line: str) -> None:
        if line.startswith(WARNING):
            _complain(line, "warning", quiet)
        elif not quiet:
            print_line(line)

    return report


def _complain(line: str, style: str, quiet: bool) -> None:
    """Print a styled line: among the others, or where quiet programs complain."""
    print_line(line, style, sys.stderr if quiet else sys.stdout)


def _clock(seconds: float) -> str:
    """Write a duration, at least 0: 00:05, 1:00:05."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


def evaluation_title(result: Mapping[str, Any]) -> str:
    """Say in two lines how an evaluation was made."""
    protocol, count = result["protocol"], result["protocol"]["seeds"]
    title = EVALUATIONS.get(result["mode"], result["mode"].capitalize())
    title += f" on {result['dataset']}" if "dataset" in result else ""
    epochs = f"{protocol['epochs']} epochs, " if "epochs" in protocol else ""
    epochs = f"{protocol['rounds']} rounds of {epochs}" if "rounds" in protocol else epochs
    return (
        f"{title}: {100 * protocol['label_fraction']:g} % of the labels "
        f"({result['labelled_images']:,}), {epochs}{count} "
        f"{'seeds' if count > 1 else 'seed'},\ntop-1 on all {result['test_images']:,} test images"
    )


def top1(row: Mapping[str, Any]) -> str:
    """Write a row's accuracy in percent: its mean, and the spread over the seeds."""
    spread = f" ± {100 * row['std']:.1f}" if row["std"] is not None else ""
    return f"{100 * row['mean']:.1f}{spread} %"


def print_results(result: Mapping[str, Any]) -> None:
    """Print the table of an evaluation; its first row is the headline."""
    print_line(evaluation_title(result))
    table = Table.grid(padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(min_width=19)
    table.add_column(min_width=20)
    table.add_column(min_width=13, justify="right")
    for place, row in enumerate(result["rows"]):
        cells = (f"  {row['encoder']}", row["method"], top1(row))
        table.add_row(*cells, style="headline" if place == 0 else None)
    console_on(sys.stdout).print(table)
    left_out = (result["rows"][0].get("sites") or [{}])[0].get("left_out")
    if left_out:
        print_line(
            f"Left out for min_images={result['protocol']['min_images']}: "
            f"{sum(left_out.values())} times a class of a site, at {len(left_out)} sites"
        )


def print_opening(title: str, facts: Mapping[str, str]) -> None:
    """Say what is about to run.

    Args:
        facts: such as the data and the model, by name; a text may have several lines.
    """
    print_line(title)
    for name, text in facts.items():
        print_line(f"  {name:10} " + text.replace("\n", "\n" + " " * 13))
    print_line("")


def print_ending(run_path: Path, output_dir: Path, labelled: bool) -> None:
    """Say where everything lies and what to try next.

    Args:
        run_path: the run's directory, output_dir: where all runs are.
        labelled: whether the images have labels to evaluate with.
    """
    print_line(f"\nEverything is in {show_path(run_path)}")
    names = [f.name + "/" * f.is_dir() for f in run_path.iterdir() if f.name[0] != "."]
    listed = ", ".join(sorted(n for n in names if not n.startswith("events.")))
    print_line(indent(fill(listed, 78), "  "))
    commands = {"python -m scripts.embed FOLDER": "the features of images"}
    if labelled:
        commands = {
            "python test.py label_fraction=0.02": "the same encoder, fewer labels",
            "python test.py eval=finetune": "tune the encoder too",
            "python main.py experiment=cifar10_cpu": "CIFAR-10 with a small budget",
        }
    commands[f"tensorboard --logdir {show_path(output_dir)}"] = "the curves of all runs"
    print_line("Next")
    for command, purpose in commands.items():
        print_line(f"  {command:38} {purpose}")


def show_path(path: Path) -> str:
    """Write a path relative to the working directory where it lies below it."""
    path, here = path.resolve(), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
