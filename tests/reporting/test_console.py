"""What a person sees of a run, in terminals and in files."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT, in_terminal

from fedssl.reporting import console as display
from fedssl.reporting.console import RoundProgress, make_report

ROW = {"round": 1, "train_loss": 3.25, "eval_loss": None, "effective_rank": 7.5, "knn": 0.5}
ROW |= {"seconds": 10.0, "seconds_train": 9.0, "failures": [], "warnings": []}
STANDING = {"phase": "train", "answered": 2, "asked": 5, "images_per_second": 1234.4}
FAULTY = ROW | {"failures": [{"partition": 4, "reason": "no memory"}], "warnings": ["collapsed"]}
SHOW = f"""
from display import RoundProgress
with RoundProgress(3) as progress:
    progress.follow({STANDING | {"answered": 0, "images_per_second": None}})
    progress.follow({STANDING})
    progress.show({FAULTY})
"""
COMMAND = [sys.executable, "-c", SHOW]


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_terminal_shows_clients_pace_and_time_left_within_its_width(columns, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    status, text = in_terminal(COMMAND, columns)
    assert status == 0, text
    assert re.search(r"round 1/3 \|.*\| 2/5 clients trained, ", text)
    assert ("1,234 images/s, 00:00 left" in text) == (columns > 60)
    drawn = re.split(r"[\r\n]", re.sub(r"\x1b\[\w+", "", text))
    assert max(map(len, drawn)) <= columns
    assert drawn[-1].strip() == ""  # nothing is left of the bar


def test_failures_and_warnings_are_coloured_in_a_terminal(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    text = in_terminal(COMMAND)[1]
    assert re.search(r"\x1b\[31m +client 4 failed: no memory\x1b\[0m", text)
    assert re.search(r"\x1b\[33m +warning: collapsed\x1b\[0m", text)


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_who_wants_no_colour_gets_none(monkeypatch, environment):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    text = in_terminal(COMMAND, **environment)[1]
    assert "client 4 failed: no memory" in text
    assert not re.search(r"\x1b\[\d*m", text)
    if "TERM" in environment:  # no line can be rewritten there
        assert "\r" not in text.replace("\r\n", "\n")
        assert "\x1b" not in text


def test_a_file_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = subprocess.run(COMMAND, capture_output=True, text=True)
    assert done.stderr == ""
    lines = done.stdout.split("\n")
    assert [line.split() for line in lines[:2]] == [
        ["round", "train", "loss", "eval", "loss", "rank", "kNN", "time"],
        ["1/3", "3.250", "-", "7.5", "50.0%", "10.0", "s"],
    ]
    assert [line.strip() for line in lines[2:]] == [
        "client 4 failed: no memory",
        "warning: collapsed",
        "",
    ]
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", done.stdout)


def test_quiet_leaves_failures_and_warnings_to_the_error_stream(capsys):
    with RoundProgress(3, quiet=True) as progress:
        progress.follow(STANDING)
        progress.show(FAULTY)
    report = make_report(quiet=True)
    report("Decoding 3 images")
    report("warning: the cache is damaged")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        "round 1: client 4 failed: no memory",
        "round 1: warning: collapsed",
        "warning: the cache is damaged",
    ]


def test_the_time_left_follows_the_clients_and_counts_down(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    progress = RoundProgress(2)
    now[0] = 100  # Ray and the clients start
    assert progress.describe() == "  round 1/2 |{bar:14}| starting, 01:40 so far"
    progress.follow(STANDING | {"answered": 0, "images_per_second": None})
    now[0] = 145
    progress.follow(STANDING | {"asked": 4})  # half of the training, 0.45 of the round
    assert progress.describe().endswith("| 2/4 clients trained, 1,234 images/s, 02:35 left")
    now[0] = 165
    assert progress.describe().endswith("02:15 left")
    now[0] = 200
    progress.follow(STANDING | {"phase": "evaluate", "answered": 0, "images_per_second": None})
    assert "0/5 clients evaluated, " in progress.describe()
    progress.show(ROW)
    assert progress.describe() == "  round 2/2 |{bar:14}| starting, 01:40 left"
