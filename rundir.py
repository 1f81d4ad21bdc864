"""The directory of a run: the one place that writes what a run leaves behind."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from errors import UserError

PACKAGES = ("flwr", "ray", "torch", "torchvision", "flwr-datasets", "scikit-learn")
LATEST = "latest"


class RunDirectory:
    """Reads and writes the files of one run; each file is replaced as a whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.results = path / "results.json"
        self.config = path / "config.yaml"

    @classmethod
    def create(cls, path: Path, config: DictConfig) -> "RunDirectory":
        """Start a run's directory with its configuration; `latest` then points to it."""
        run = cls(path.resolve())
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        write_atomically(run.config, OmegaConf.to_yaml(config, resolve=True).encode())
        _point_latest(Path(config.output_dir).resolve() / LATEST, run.path)
        return run

    def load_config(self) -> DictConfig:
        """Read the configuration that the run was started with.

        Raises:
            UserError: no such run.
        """
        if not self.config.is_file():
            raise UserError(
                f"run={self.path}: no config.yaml there; give the directory of a run of main.py"
            )
        return OmegaConf.load(self.config)

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add a round's line to metrics.jsonl."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read_metrics(self) -> list[dict[str, Any]]:
        """Read the lines of metrics.jsonl, one a round."""
        if not self.metrics.is_file():
            return []
        return [json.loads(line) for line in self.metrics.read_text().splitlines()]

    def save_checkpoint(self, round_number: int, state: Mapping[str, Tensor], keep: int) -> None:
        """Write the model after a round, then its JSON, then drop all but `keep` of them."""
        data = save({name: tensor.contiguous() for name, tensor in state.items()})
        file = self.checkpoints / f"round-{round_number:04d}.safetensors"
        write_atomically(file, data)
        facts = {"round": round_number, "sha256": hashlib.sha256(data).hexdigest()}
        write_atomically(file.with_suffix(".json"), json.dumps(facts).encode())
        for old in self.list_checkpoints()[:-keep]:
            old.with_suffix(".json").unlink(missing_ok=True)
            old.unlink(missing_ok=True)

    def list_checkpoints(self) -> list[Path]:
        """List the complete checkpoints, oldest first."""
        files = sorted(self.checkpoints.glob("round-*.safetensors"))
        return [file for file in files if file.with_suffix(".json").is_file()]

    def last_checkpoint(self) -> Path:
        """Find the newest checkpoint.

        Raises:
            UserError: the run has none.
        """
        files = self.list_checkpoints()
        if not files:
            raise UserError(f"run={self.path}: no checkpoint; the run ended before its first round")
        return files[-1]

    def save_encoder(self, state: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
        """Write the encoder alone, with torchvision's names, and facts as its metadata."""
        tensors = {name: tensor.contiguous() for name, tensor in state.items()}
        write_atomically(self.path / "encoder.safetensors", save(tensors, metadata=dict(facts)))

    def add_result(self, result: Mapping[str, Any]) -> None:
        """Append an evaluation to results.json, which keeps them all."""
        earlier = json.loads(self.results.read_text()) if self.results.is_file() else []
        text = json.dumps([*earlier, result], indent=2)
        write_atomically(self.results, text.encode())


def load_checkpoint(file: Path) -> tuple[dict[str, Tensor], int]:
    """Read a checkpoint and the round it was made after.

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
        facts = json.loads(beside.read_text())
        intact = hashlib.sha256(data).hexdigest() == facts["sha256"]
        state = load(data) if intact else {}
        round_number = int(facts["round"])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: not a checkpoint of this project ({error})") from error
    if not intact:
        raise UserError(f"{where}: truncated or damaged ({len(data)} bytes); use another round's")
    return state, round_number


def write_atomically(file: Path, data: bytes) -> None:
    """Write a file under a temporary name, sync it, and rename it into place."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with temporary.open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, file)


def check_writable(directory: Path) -> None:
    """Make sure that a run's directory can be made, leaving nothing behind.

    Raises:
        UserError: it can't be made or written.
    """
    existing = directory.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        probe = existing / f".writable-{os.getpid()}"
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise UserError(
            f"output_dir={directory}: can't be written ({error.strerror}: {existing}); "
            "choose another with output_dir=DIR"
        ) from error


def provenance() -> dict[str, Any]:
    """Tell what a number was measured with: time, commit, versions, hardware."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "hardware": {"processor": _processor(), "cores": os.cpu_count(), "gpu": gpu},
    }


def _commit() -> str | None:
    """Name the project's commit, with a + when files differ from it."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.decode().strip() + ("+" if changed.stdout.strip() else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _point_latest(link: Path, run: Path) -> None:
    temporary = link.with_name(f".{LATEST}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(run, link.parent), target_is_directory=True)
    os.replace(temporary, link)
