"""The numbers of a round: written, read, and shown wherever their fields say."""

import json
import logging
from dataclasses import dataclass, fields, replace

import pytest
from conftest import ROOT

from fedssl.reporting import console, page
from fedssl.reporting.console import RoundProgress
from fedssl.reporting.log import log_round
from fedssl.runs.directory import RunDirectory
from fedssl.runs.metrics import (
    EVERYWHERE,
    ClientMetrics,
    Failure,
    NodeEvent,
    RoundMetrics,
    Where,
    shown,
)

CLIENTS = (
    ClientMetrics(0, 647, 3.5, 2.5, 1.25, 0.5, 640, 183.0),
    ClientMetrics(2, eval_loss=2.75),
)
ROUND = RoundMetrics(
    round=3,
    train_loss=3.25,
    effective_rank=12.34,
    knn=0.5,
    seconds=10.0,
    images_per_second=1234.4,
    bytes_moved=45_600_000,
    clients=CLIENTS,
    failures=(Failure(1, "no memory"),),
    warnings=("collapsed",),
)
RECORDED = sorted((ROOT / "results").rglob("metrics.jsonl"))


def test_what_is_written_is_read():
    line = json.loads(json.dumps(ROUND.to_json()))
    assert RoundMetrics.from_json(line) == ROUND
    assert line["clients"][1] == {"partition": 2, "eval_loss": 2.75}


EVENTS = (
    NodeEvent("joined", 0),
    NodeEvent("back", 1, "south"),
    NodeEvent("left", 2),
    NodeEvent("refused", 2, "west", "no image"),
    NodeEvent("refused", reason="its key is not in nodes_file"),
)


def test_names_and_nodes_are_written_and_read_and_left_out_where_there_are_none():
    named = replace(
        ROUND, failures=(Failure(1, "no memory", "south"), Failure(2, "late")), nodes=EVENTS
    )
    line = json.loads(json.dumps(named.to_json()))
    assert RoundMetrics.from_json(line) == named
    assert line["failures"][1] == {"partition": 2, "reason": "late"}
    assert line["nodes"][0] == {"event": "joined", "partition": 0}
    assert line["nodes"][1]["name"] == "south"
    assert [failure.who for failure in named.failures] == ["south", "client 2"]


def test_what_happened_to_a_node_is_a_sentence():
    assert [str(event) for event in EVENTS] == [
        "partition 0 is connected",
        "south (partition 1) is connected again",
        "partition 2 is gone",
        "west (partition 2) is refused: no image",
        "a node is refused: its key is not in nodes_file",
    ]


def test_a_line_of_an_older_run_is_read():
    client = {"partition": 0, "train_loss": 3.5, "step": 1.25, "cosine": None, "gone": 1}
    line = {"round": 1, "train_loss": 3.5, "clients": [client], "failures": [], "gone": 1}
    expected = RoundMetrics(1, 3.5, clients=(ClientMetrics(0, train_loss=3.5, update_norm=1.25),))
    assert RoundMetrics.from_json(line) == expected


@pytest.mark.parametrize("file", RECORDED, ids=lambda file: str(file.parent.name))
def test_every_recorded_run_is_read(file):
    rounds = RunDirectory(file.parent).read_metrics()
    assert [metrics.round for metrics in rounds] == list(range(1, len(rounds) + 1))
    assert all(metrics.seconds and metrics.clients for metrics in rounds)
    masked = "secure" in file.parts[-3]  # then nobody saw a single update
    assert any(client.update_norm for client in rounds[-1].clients) is not masked


@pytest.mark.parametrize(
    "line",
    [
        5,
        [1],
        {},
        {"round": 1},
        {"round": 1, "clients": [5], "failures": []},
        {"round": 1, "clients": [{}], "failures": []},
        {"round": 1, "clients": [], "failures": [{"reason": "no partition"}]},
        {"round": 1, "clients": [], "failures": None},
        {"round": 1, "clients": [], "failures": [], "nodes": [{"partition": 1}]},
        {"round": "1", "clients": [], "failures": []},
        {"round": 1, "clients": [], "failures": [], "knn": "high"},
    ],
)
def test_what_is_no_round_is_refused(line):
    with pytest.raises(ValueError, match="no round of a run"):
        RoundMetrics.from_json(line)


def test_a_number_is_written_with_its_format_scale_and_unit():
    assert ROUND.texts(Where.PAGE) == {
        "train loss": "3.250",
        "eval loss": None,
        "rank": "12.3",
        "uniformity": None,
        "alignment": None,
        "kNN": "50.0%",
        "time": "10.0 s",
        "images/s": "1,234",
        "moved": "46 MB",
        "epsilon": None,
    }


def test_the_curves_are_those_of_the_round_and_of_its_clients():
    assert ROUND.curves() == {
        "train_loss": 3.25,
        "effective_rank": 12.34,
        "knn": 0.5,
        "seconds": 10.0,
        "images_per_second": 1234.4,
        "bytes_moved": 45_600_000,
        "client_train_loss/0": 3.5,
        "client_eval_loss/0": 2.5,
        "client_update_norm/0": 1.25,
        "client_cosine/0": 0.5,
        "client_eval_loss/2": 2.75,
    }


def test_labels_name_one_number_each():
    labels = [how.label for _, how in RoundMetrics.numbers(EVERYWHERE)]
    assert len(labels) == len(set(labels))


@dataclass(frozen=True)
class Extended(RoundMetrics):
    """A number more, as somebody would add it."""

    spin: float | None = shown("spin", ".2f", " rad")


def test_a_new_number_is_shown_everywhere_by_its_field_alone(monkeypatch, capsys, caplog):
    for module in (console, page):
        monkeypatch.setattr(module, "RoundMetrics", Extended)
    values = {each.name: getattr(ROUND, each.name) for each in fields(ROUND)}
    one, none = Extended(**values, spin=1.5), Extended(**values)
    with RoundProgress(9) as progress:
        progress.show(one)
        progress.show(none)
    head, first, _, _, second, _, _ = capsys.readouterr().out.splitlines()
    assert head.endswith("  kNN      time        spin")
    assert first.endswith(" 50.0%    10.0 s    1.50 rad")
    assert second.endswith(" 50.0%    10.0 s           -")
    with caplog.at_level(logging.INFO):
        log_round(logging.getLogger("test"), one)
    assert caplog.messages == [
        "round 3: train loss 3.250, kNN 50.0%, time 10.0 s, images/s 1,234, moved 46 MB, "
        "spin 1.50 rad",
        "  without client 1: no memory",
        "  collapsed",
    ]
    assert one.curves()["spin"] == 1.5
    assert [line[-1] for line in page.table_of_rounds([one, none])] == ["spin", "1.50 rad", "–"]
    assert Extended.from_json(json.loads(json.dumps(one.to_json()))) == one
