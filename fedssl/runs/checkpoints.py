"""Checkpoints: all that a run needs to go on after a round, with checksums.

A round leaves `round-0003.safetensors` (the global model), for strategies with
state, and for arrays beside the model, `server-0003.safetensors`, and last `round-0003.json`, which
holds the checksums of both, of itself, and the round's metrics line. Without an
intact JSON there is no checkpoint.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, numpy, torch
from torch import Tensor, from_numpy

from fedssl.errors import UserError
from fedssl.files import write_atomically
from fedssl.runs.metrics import RoundMetrics


@dataclass(frozen=True)
class ServerState:
    """The state of a strategy.

    Attributes:
        tree: JSON, in which an array is a number, its place among the arrays.
        arrays: by that number, as text.
    """

    tree: Any = None
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a round.

    Attributes:
        state: of the global model.
        strategy: the state of the strategy, such as a server optimizer's moments.
        metrics: the round's numbers.
        images: names the content of the images that were trained on.
        beside: arrays beside the model's that the run goes on with, by names with a point.
    """

    round: int
    state: Mapping[str, Tensor]
    strategy: ServerState = field(default_factory=ServerState)
    metrics: RoundMetrics | None = None
    images: str | None = None
    beside: Mapping[str, Tensor] = field(default_factory=dict)


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> None:
    """Write a checkpoint, then drop all but the newest `keep`.

    Raises:
        OSError: it can't be written; the earlier ones are untouched.
    """
    model_file, server_file, facts_file = _files(folder, checkpoint.round)
    model = torch.save({name: tensor.contiguous() for name, tensor in checkpoint.state.items()})
    write_atomically(model_file, model)
    facts: dict[str, Any] = {"round": checkpoint.round, "sha256": _digest(model)}
    facts["strategy"] = checkpoint.strategy.tree
    beside = {name: value.cpu().numpy() for name, value in checkpoint.beside.items()}
    if arrays := {**checkpoint.strategy.arrays, **beside}:
        server = numpy.save({k: np.asarray(v, order="C") for k, v in arrays.items()})
        write_atomically(server_file, server)
        facts["server_sha256"] = _digest(server)
    row = checkpoint.metrics.to_json() if checkpoint.metrics else {}
    facts |= {"images": checkpoint.images, "row": row}
    facts["facts_sha256"] = _digest(json.dumps(facts).encode())
    write_atomically(facts_file, json.dumps(facts).encode())
    for old in list_checkpoints(folder)[:-keep]:
        for file in reversed(_files(folder, _round_of(old))):
            file.unlink(missing_ok=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """List the model files of the finished checkpoints, oldest first."""
    files = sorted(folder.glob("round-*.safetensors"), key=_round_of)
    return [file for file in files if file.with_suffix(".json").is_file()]


def list_unfinished(folder: Path) -> list[Path]:
    """List the model files whose JSON was never written."""
    return sorted(set(folder.glob("round-*.safetensors")) - set(list_checkpoints(folder)))


def remove_after(folder: Path, round_number: int) -> None:
    """Remove what lies behind a round: unfinished or damaged checkpoints."""
    for file in folder.glob("*-*.*"):
        if _round_of(file) > round_number:
            file.unlink()


def load_checkpoint(file: Path) -> Checkpoint:
    """Read a checkpoint by its model file.

    Raises:
        UserError: the file is missing, damaged, or no checkpoint.
    """
    where = f"checkpoint={file}"
    if not file.is_file():
        raise UserError(f"{where}: no such file; give a .safetensors below a run's checkpoints/")
    beside = file.with_suffix(".json")
    if not beside.is_file():
        raise UserError(f"{where}: its {beside.name} is missing, so it is no complete checkpoint")
    data = file.read_bytes()
    try:
        facts = json.loads(beside.read_bytes())
        own_digest = facts.pop("facts_sha256")
        round_number, digest = int(facts["round"]), facts["sha256"]
        metrics = RoundMetrics.from_json(facts["row"]) if facts["row"] else None
        images = facts["images"]
        server_digest, tree = facts.get("server_sha256"), facts.get("strategy")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: {beside.name} is damaged ({error}); use another's") from error
    if _digest(json.dumps(facts).encode()) != own_digest:
        raise UserError(f"{where}: {beside.name} is damaged; use another round's")
    if _digest(data) != digest:
        raise UserError(f"{where}: truncated or damaged ({len(data)} bytes); use another round's")
    try:
        state = torch.load(data)
        arrays = {}
        if server_digest:
            server_file = _files(file.parent, round_number)[1]
            remembered = server_file.read_bytes()
            if _digest(remembered) != server_digest:
                raise ValueError(f"{server_file.name} is truncated or damaged")
            arrays = numpy.load(remembered)
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{where}: can't be read ({error}); use another round's") from error
    more = {name: from_numpy(arrays.pop(name)) for name in [n for n in arrays if "." in n]}
    return Checkpoint(round_number, state, ServerState(tree, arrays), metrics, images, more)


def _files(folder: Path, round_number: int) -> tuple[Path, Path, Path]:
    """Name the files of a round: the model, the state of the strategy, the metadata."""
    number = f"{round_number:04d}"
    names = (f"round-{number}.safetensors", f"server-{number}.safetensors", f"round-{number}.json")
    return folder / names[0], folder / names[1], folder / names[2]


def _round_of(file: Path) -> int:
    number = file.stem.partition("-")[2]
    return int(number) if number.isdecimal() else 0


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
