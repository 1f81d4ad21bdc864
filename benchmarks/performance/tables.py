"""The tables of docs/performance.md and docs/federation.md, from records of benchmarks."""

import json
from collections.abc import Callable
from typing import Any

from benchmarks.markdown import head, line
from fedssl.env import ROOT

RESULTS = ROOT / "results"


def read(name: str) -> Any:
    """Read a record; None if there is none."""
    file = RESULTS / name
    return json.loads(file.read_text()) if file.exists() else None


def hardware_of(record: Any) -> str:
    """Say on what something was measured."""
    found = record["measured"]["hardware"]
    gpu = f", {found['gpu']}" if found["gpu"] else ""
    return f"{found['cores']} cores of {found['processor']}{gpu}"


def speed_table() -> list[str]:
    """Tabulate images per second by ours, the bare network and the usual way, with their spread."""
    names = ("ours", "bare", "usual", "of the bare", "times the usual")
    lines = head("encoder", "stem", "batch", *names)
    record = read("speed.json")
    for row in record["rows"]:
        speeds = []
        for way in ("ours", "bare", "usual"):
            lowest, highest = min(row["all"][way]), max(row["all"][way])
            middle = row["images_per_second"][way]
            speeds.append(f"{middle:.0f} ({lowest:.0f} to {highest:.0f})")
        ratios = f"{row['of_bare']:.2f}", f"{row['over_usual']:.1f}"
        lines.append(line(row["encoder"], row["stem"], row["batch"], *speeds, *ratios))
    precision = record["precision"].removeprefix("torch.")
    return [*lines, "", f"On {hardware_of(record)}, in {precision}."]


def scale_table() -> list[str]:
    """Tabulate start, rounds and memory over the number of clients."""
    if (record := read("clients.json")) is None:
        return ["Not recorded yet."]
    names = ("start", "a round beside its training", "memory at first", "in the last round")
    lines = head("clients", "Ray nodes", *names)
    for row in record["rows"]:
        memory = row["own_mb_by_round"]
        seconds = f"{row['startup_s']:.0f} s", f"{row['round_overhead_s']:.1f} s"
        megabytes = [f"{value:,} MB" for value in (memory[1], memory[-1])]
        if row["ray_nodes"] > 1:  # their clients are not below main.py
            megabytes = ["", ""]
        lines.append(line(f"{row['clients']:,}", row["ray_nodes"], *seconds, *megabytes))
    return [*lines, "", f"On {hardware_of(record)}."]


def pace_of(method: str) -> str:
    """Show the images per second of a method beside those of SimCLR, nothing if not recorded."""
    paces = (read("methods_speed.json") or {"methods": {}})["methods"]
    return f"{paces[method]['of_simclr']:.2f}" if method in paces else ""


def wire_table() -> list[str]:
    """Tabulate what a round costs a node: requests, bytes, seconds.

    Those with each array on its own are an older record, with seconds that are no match.
    """
    lines = head("encoder", "arrays", "wire", "delay", "requests", "down", "up", "a round")
    for row in [*read("wire.json")["rows"], *read("wire_apart.json")["rows"]]:
        packed = "one array" if row["packed"] else "each on its own"
        cells = f"{row['delay_ms']:.0f} ms", f"{row['requests']:.0f}"
        cells += tuple(f"{row[way]:.0f} MB" for way in ("down_mb", "up_mb"))
        wire = row.get("wire", "float32")
        seconds = f"{row['seconds']:.1f} s" if row["packed"] else ""
        lines.append(line(row["encoder"], packed, wire, *cells, seconds))
    return lines


TABLES: dict[str, Callable[[], list[str]]] = {
    "speed": speed_table,
    "scale": scale_table,
    "wire": wire_table,
}
