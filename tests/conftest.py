"""Fixtures on small real data: scikit-learn's digits and, where present, CIFAR-10."""

import ast
import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # tests share few cores: waiting must cost none
os.environ.setdefault("RAY_worker_niceness", "0")  # else clients starve beside other tests
os.environ["OMP_NUM_THREADS"] = str(  # more threads than cores stand in each other's way
    max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
)

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.resnet import ResNet

from fedssl.config.compose import load_config
from fedssl.data.cache import open_image_set
from fedssl.env import ROOT
from fedssl.runs.directory import RunDirectory
from utils import build_method, open_source, plain

CIFAR10 = Path(os.environ.get("CIFAR10_DIR", ROOT.parent / "shared" / "data" / "cifar10"))
CPU = torch.device("cpu")
THREADS = int(os.environ["OMP_NUM_THREADS"])

LONGEST = ("test_deployment", "test_labels", "test_main", "test_rounds", "test_page", "test_resume")
LONGEST += ("test_door", "test_faults", "test_processes", "test_walkthrough")


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


def open_images(source, image_size, cache_dir, seed=0, **options):
    """Open an image set by seed 0."""
    return open_image_set(source, image_size, str(cache_dir), seed, **options)


def screen(text):
    """Give the lines that a terminal shows after a text, without style and blank ones at the end.

    A code that moves the cursor in another way than rich's moving lines do is an error.
    """
    lines, row, column = [""], 0, 0
    for piece in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", text):
        if piece == "\r":
            column = 0
        elif piece == "\n":  # the terminal driver sends \r\n
            row += 1
            lines += [""] * (row == len(lines))
        elif not piece.startswith("\x1b"):
            line = lines[row].ljust(column)
            lines[row] = line[:column] + piece + line[column + len(piece) :]
            column += len(piece)
        elif piece == "\x1b[2K":
            lines[row] = ""
        elif piece[-1] == "A":
            row -= int(piece[2:-1] or 1)
        else:
            assert piece[-1] == "m", f"unknown code {piece!r}"
    while len(lines) > 1 and not lines[-1].strip():
        lines.pop()
    return lines


def create_run(path, config, overrides=()):
    """Start a run's directory as main.py does."""
    return RunDirectory.create(path, plain(config), config.output_dir, overrides)


def narrow_resnets(patch):
    """Build ResNets of an eighth of the width, so that a message has 1 MB instead of 46."""
    whole = ResNet._make_layer

    def narrowed(network, block, planes, *arguments, **options):
        return whole(network, block, planes // 8, *arguments, **options)

    patch.setattr(ResNet, "_make_layer", narrowed)


@pytest.fixture
def narrow(monkeypatch, request):
    """Have small networks, for what depends on no width."""
    if request.node.get_closest_marker("whole") is None:
        narrow_resnets(monkeypatch)


@pytest.fixture(autouse=True)
def threads():
    """Share the cores among the workers of pytest, whatever a client of the last test took."""
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def same_draws():
    """Have the same draws in every run and order, where a test names no generator."""
    torch.manual_seed(0)


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
    return open_images(open_source(load_config("config", []).dataset), 8, cache_dir)


@pytest.fixture
def method(config):
    return build_method(config, CPU)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def pets(tmp_path, rng):
    """Class folders with images of many modes and sizes, 6 of each class."""
    root = tmp_path / "pets"
    for number, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for index, mode in enumerate(("RGB", "L", "RGBA", "P", "CMYK", "I;16")):
            size = (20 + 10 * index, 30)
            if mode == "I;16":
                image = Image.fromarray(rng.integers(0, 2**16, size[::-1], dtype=np.uint16))
            else:
                pixels = rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
                image = Image.fromarray(pixels).convert(mode)
            suffix = "jpg" if mode == "CMYK" else "png"
            image.save(root / name / f"{number}{index}.{suffix}")
    return root
