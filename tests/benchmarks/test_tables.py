"""Tables of recorded runs, and their places on the pages."""

import json

import pytest

from benchmarks.accuracy import tables


def test_a_table_tells_mean_and_spread_of_what_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for seed, top1 in enumerate((0.5, 0.6)):
        folder = tmp_path / "sweep" / "clients-5" / f"seed{seed}"
        folder.mkdir(parents=True)
        row = {"encoder": "federated SimCLR", "method": "linear head", "mean": top1}
        result = {"mode": "linear", "protocol": {"label_fraction": 0.1}, "rows": [row]}
        (folder / "results.json").write_text(json.dumps([result]))
    _, _, *lines = tables.comparison_table()
    assert lines[0] == "| 5 clients, IID, FedAvg | | 55.0 ± 7.1 | | | | 2 |"
    assert lines[1] == "| random encoder | | | | | | 2 |"  # nothing in between is recorded


def test_a_place_without_an_end_is_an_error():
    with pytest.raises(ValueError, match="'digits' has no end"):
        tables.fill("<!-- digits -->\n| seed |\n")


def test_a_table_without_a_place_is_named(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("nothing")
    monkeypatch.setattr(tables, "PAGES", (page,))
    with pytest.raises(SystemExit, match="no page has a place for the table 'digits'"):
        tables.main()
