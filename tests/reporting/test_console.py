"""What a person sees of a run, in terminals and in files."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import ROOT, in_terminal, screen

from fedssl.reporting import console
from fedssl.reporting.console import (
    RoundProgress,
    make_report,
    print_ending,
    print_opening,
    print_results,
)
from fedssl.runs.metrics import Failure, Progress, RoundMetrics

ROUND = RoundMetrics(1, 3.25, None, effective_rank=7.5, knn=0.5, seconds=10.0, seconds_train=9.0)
FAULTY = replace(
    ROUND, failures=(Failure(4, "no [bold]memory[/] :boom:"),), warnings=("collapsed",)
)
STARTED, TRAINED = Progress("train", 0, 5), Progress("train", 2, 5, 1234.4)
LONG = "going on with /a/" + "very-long-name/" * 12 + "run"
SHOW = f"""
import sys, time
from fedssl.reporting.console import RoundProgress, Waiting, make_report
from fedssl.runs.metrics import Failure, Progress, RoundMetrics
with RoundProgress(3) as progress:
    progress.follow({STARTED})
    progress.follow({TRAINED})
    print("a line of somebody else")
    progress.show({FAULTY})
with Waiting("linear evaluation"):
    make_report(False)("warning: no report")
    time.sleep(0.3)
print("the end")
"""
COMMAND = [sys.executable, "-c", SHOW]
HEAD = ["round", "train", "loss", "eval", "loss", "rank", "kNN", "time"]
OTHER = ["a", "line", "of", "somebody", "else"]
LINES = [
    ["1/3", "3.250", "-", "7.5", "50.0%", "10.0", "s"],
    ["client", "4", "failed:", "no", "[bold]memory[/]", ":boom:"],
    ["warning:", "collapsed"],
    ["warning:", "no", "report"],
    ["the", "end"],
]


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_terminal_shows_clients_pace_and_time_left_within_its_width(columns):
    status, text = in_terminal(COMMAND, columns)
    assert status == 0, text
    assert re.search(r"  round 1/3 \|█▋            \| 2/5 clients trained, ", text)
    assert ("1,234 images/s, 00:00 left" in text) == (columns > 60)
    assert re.search(r"  \S linear evaluation, 00:00 so far", text)
    drawn = re.split(r"[\r\n]", re.sub(r"\x1b\[[?\d;]*\w", "", text))
    assert max(map(len, drawn)) <= columns


def test_what_stays_in_a_terminal_are_the_lines_that_a_file_gets():
    text = in_terminal(COMMAND)[1]
    assert "\x1b[?25l" not in text  # a killed program would leave the cursor hidden
    assert [line.split() for line in screen(text)] == [
        HEAD,
        OTHER,
        *LINES,
    ]


def test_failures_and_warnings_are_coloured_in_a_terminal():
    text = in_terminal(COMMAND)[1]
    assert re.search(r"\x1b\[31m +client 4 failed: no \[bold\]memory\[/\] :boom:\x1b\[0m", text)
    assert re.search(r"\x1b\[33m +warning: collapsed\x1b\[0m", text)
    assert set(re.findall(r"\x1b\[([\d;]*)m", text)) == {"31", "33", "0"}  # numbers are plain


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_who_wants_no_colour_gets_none(environment):
    text = in_terminal(COMMAND, **environment)[1]
    assert "client 4 failed: no [bold]memory[/]" in text
    assert not re.search(r"\x1b\[[\d;]*m", text)
    if "TERM" in environment:  # no line can be rewritten there
        assert "\r" not in text.replace("\r\n", "\n")
        assert "\x1b" not in text


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1"}, {"COLUMNS": "20"}])
def test_a_file_gets_plain_lines(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run(COMMAND, capture_output=True, text=True)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line.split() for line in lines] == [HEAD, OTHER, *LINES]
    assert len(lines[0]) == len(lines[2])
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", done.stdout)


def test_a_long_line_is_never_broken(capsys):
    make_report(quiet=False)(LONG)
    make_report(quiet=True)(f"warning: {LONG}")
    assert capsys.readouterr() == (f"{LONG}\n", f"warning: {LONG}\n")
    code = f"from fedssl.terminal import print_line; print_line({LONG!r})"
    assert in_terminal([sys.executable, "-c", code])[1] == f"{LONG}\r\n"  # the terminal's affair


def test_epsilon_has_a_column_where_there_is_one(capsys):
    for private in (True, False):
        with RoundProgress(3, private=private) as progress:
            progress.show(RoundMetrics(1, epsilon=2.5, delta=1e-5))
        head, line = capsys.readouterr().out.splitlines()
        assert ("epsilon" in head, "2.50" in line) == (private, private)
        assert len(head) <= 80


def test_quiet_leaves_failures_and_warnings_to_the_error_stream(capsys):
    with RoundProgress(3, quiet=True) as progress:
        progress.follow(TRAINED)
        progress.show(FAULTY)
    report = make_report(quiet=True)
    report("Decoding 3 images")
    report("warning: the cache is damaged")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        "round 1: client 4 failed: no [bold]memory[/] :boom:",
        "round 1: warning: collapsed",
        "warning: the cache is damaged",
    ]


def test_the_time_left_follows_the_clients_and_counts_down(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    progress = RoundProgress(2)
    now[0] = 100  # Ray and the clients start
    assert progress.render().plain == f"  round 1/2 |{' ' * 14}| starting, 01:40 so far"
    progress.follow(STARTED)
    now[0] = 145
    progress.follow(replace(TRAINED, asked=4))  # half of the training, 0.45 of the round
    shown = progress.render().plain
    assert shown == "  round 1/2 |███▏          | 2/4 clients trained, 1,234 images/s, 02:35 left"
    now[0] = 165
    assert progress.describe().endswith("02:15 left")
    now[0] = 200
    progress.follow(Progress("evaluate", 0, 5))
    assert "0/5 clients evaluated, " in progress.describe()
    progress.show(ROUND)
    assert progress.render().plain == "  round 2/2 |███████       | starting, 01:40 left"
    now[0] = 200 - 3700
    assert progress.describe().endswith("1:03:20 left")


ROWS = [
    {"encoder": "federated SimCLR", "method": "linear head", "mean": 0.975, "std": 0.007},
    {"encoder": "random encoder", "method": "kNN", "mean": 0.8, "std": None},
]
RESULT = {"mode": "linear", "labelled_images": 143, "test_images": 360, "rows": ROWS}
RESULT |= {"protocol": {"seeds": 3, "label_fraction": 0.1, "epochs": 20}}
TABLE = """\
Linear evaluation: 10 % of the labels (143), 20 epochs, 3 seeds,
top-1 on all 360 test images
  federated SimCLR  linear head           97.5 ± 0.7 %
  random encoder    kNN                         80.0 %
"""


def test_the_results_are_a_table_and_bold_is_the_headline_alone(capsys):
    print_results(RESULT)
    assert capsys.readouterr().out == TABLE
    code = f"from fedssl.reporting.console import print_results; print_results({RESULT})"
    text = in_terminal([sys.executable, "-c", code])[1]
    assert screen(text) == TABLE.splitlines()
    lines = text.splitlines()
    assert ["\x1b[1m" in line for line in lines] == [False, False, True, False]
    plain = re.sub(r"\x1b\[1m.*?\x1b\[0m", "", lines[2])
    assert plain.strip() == ""  # all of it


def test_what_sites_leave_out_is_told_below_their_table(capsys):
    protocol = {"label_fraction": 0.1, "seeds": 1, "epochs": 4, "rounds": 5, "min_images": 3}
    rows = [{**ROWS[0], "sites": [{"left_out": {"0": 2, "3": 1}}]}]
    result = {**RESULT, "mode": "federated_finetune", "protocol": protocol, "rows": rows}
    print_results(result)
    title, _, _, last = capsys.readouterr().out.splitlines()
    assert (
        title == "Fine-tuning at the sites: 10 % of the labels (143), 5 rounds of 4 epochs, 1 seed,"
    )
    assert last == "Left out for min_images=3: 3 times a class of a site, at 2 sites"
    rows[0]["sites"][0]["left_out"] = {}
    print_results(result)
    assert "Left out" not in capsys.readouterr().out


def test_the_opening_and_the_ending_say_what_runs_where(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    print_opening("Federated SimCLR", {"data": "digits", "running": "2 clients,\ndevice cpu"})
    run = tmp_path / "outputs" / "run"
    (run / "figures").mkdir(parents=True)
    for name in ("report.html", ".lock", "events.out"):
        (run / name).touch()
    print_ending(run, tmp_path / "outputs", labelled=True)
    assert (
        capsys.readouterr().out
        == """\
Federated SimCLR
  data       digits
  running    2 clients,
             device cpu


Everything is in outputs/run
  figures/, report.html
Next
  python test.py label_fraction=0.02     the same encoder, fewer labels
  python test.py eval=finetune           tune the encoder too
  python main.py experiment=cifar10_cpu  CIFAR-10 with a small budget
  tensorboard --logdir outputs           the curves of all runs
"""
    )
    print_ending(run, tmp_path / "outputs", labelled=False)
    text = capsys.readouterr().out
    assert "scripts.embed" in text
    assert "test.py" not in text
