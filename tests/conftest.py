"""Fixtures on small real data: scikit-learn's digits and, where present, CIFAR-10."""

import ast
import fcntl
import os
import pty
import struct
import subprocess
import termios
from pathlib import Path

import numpy as np
import pytest
import torch

from fedssl.config.compose import load_config
from fedssl.data.cache import open_image_set
from fedssl.env import ROOT
from utils import build_model

CIFAR10 = Path(os.environ.get("CIFAR10_DIR", ROOT.parent / "shared" / "data" / "cifar10"))
CPU = torch.device("cpu")

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, (os.cpu_count() or 1) // WORKERS))

LONGEST = ("test_deployment", "test_main", "test_resume", "test_faults", "test_walkthrough")


def pytest_collection_modifyitems(items):
    """Begin with the longest files, so that the workers end at the same time."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def imported_modules(name):
    """Name what a file at the root imports anywhere, functions included, with all parents."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for parts in (each.split(".") for each in names):
            found |= {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
    return found


def in_terminal(command, columns=80, **variables):
    """Run a command in a terminal of so many columns; return its status and all that it wrote."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    plain = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")}
    env = plain | {"TERM": "xterm"} | variables
    process = subprocess.Popen(list(map(str, command)), stdin=its, stdout=its, stderr=its, env=env)
    os.close(its)
    pieces = []
    try:
        while piece := os.read(ours, 65536):
            pieces.append(piece)
    except OSError:  # how Linux says that the terminal was left
        pass
    os.close(ours)
    return process.wait(), b"".join(pieces).decode()


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def cifar10():
    if not CIFAR10.is_dir():
        pytest.skip(f"no CIFAR-10 at {CIFAR10}; set CIFAR10_DIR to a folder with its parquet files")
    return CIFAR10


@pytest.fixture
def config(cache_dir, tmp_path):
    """The real configuration, shrunk by its own keys."""
    shrink = ["num_clients=2", "num_rounds=2", "train.local_epochs=1", "train.max_steps=2"]
    places = [f"cache_dir={cache_dir}", f"output_dir={tmp_path}"]
    return load_config("config", [*shrink, *places, "precision=float32", "num_cpus=1"])


@pytest.fixture(scope="session")
def digits(cache_dir):
    return open_image_set(load_config("config", []).dataset, cache_dir, seed=0)


@pytest.fixture
def model(config):
    return build_model(config.model, config.dataset, 0, CPU)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
