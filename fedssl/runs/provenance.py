"""What a number was measured with: time, commit, versions, hardware."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fedssl.env import ROOT

PACKAGES = ("flwr", "ray", "torch", "torchvision", "flwr-datasets", "scikit-learn")


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
    git = ["git", "-C", str(ROOT)]
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
