"""Flower's superexec for a node, with ClientApps that begin in a fork instead of a new Python.

    python -c "from fedssl.deployment.superexec import main; main()" ARGUMENTS OF flower-superexec

Flower starts a process for every message, of which importing PyTorch and Flower takes most of
the time of a short round. Here the standard library's fork server has imported both once. It
imports nothing of an app, so that every message still runs the code of its own bundle.
"""

import inspect
import multiprocessing
import sys
from collections.abc import Sequence
from multiprocessing import forkserver
from types import SimpleNamespace
from typing import Any

from flwr.supercore.cli import flower_superexec
from flwr.supercore.constant import TASK_TYPE_TO_COMMAND, TaskType
from flwr.supercore.superexec.executor import subprocess_executor

from fedssl import pulling

# What apps of this project import from elsewhere; it takes seconds, once.
PRELOADED = [
    *("torch", "torchvision", "safetensors.torch", "safetensors.numpy", "PIL.Image"),
    *("hydra", "omegaconf", "pydantic", "cryptography.hazmat.primitives.asymmetric.ec"),
    *("flwr.supernode.cli", "flwr.clientapp.mod", "flwr.serverapp.strategy"),
]
# As text, since a fork imports nothing of this project.
IN_A_FORK = f"""{inspect.getsource(pulling)}
pull_soon()

from flwr.supernode.cli import flwr_clientapp

flwr_clientapp()
"""
COMMAND = TASK_TYPE_TO_COMMAND[TaskType.CLIENT_APP]


def main() -> None:
    """Run Flower's command with the fork server beside it."""
    start_fork_server()
    plain = subprocess_executor.subprocess

    def start(command: Sequence[str], **rest: Any) -> object:
        return plain.Popen(command, **rest) if rest or command[0] != COMMAND else fork(command)

    changed = SimpleNamespace(Popen=start, DEVNULL=plain.DEVNULL)
    subprocess_executor.subprocess = changed  # type: ignore[assignment]
    flower_superexec()


def start_fork_server() -> None:
    """Start the fork server, which imports PyTorch and Flower meanwhile.

    The main module is to be no file: a fork would import it, and with it this project.
    """
    sys.path = [folder for folder in sys.path if folder]  # a fork finds no module of this project
    multiprocessing.set_start_method("forkserver")
    multiprocessing.set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()


def fork(command: Sequence[str]) -> multiprocessing.Process:
    """Start Flower's command for a ClientApp in a fork, which ends with this process.

    Args:
        command: with its arguments, among them `--parent-pid`.
    """
    multiprocessing.active_children()  # takes leave of those that have ended
    sys.argv = list(command)  # what the fork's will be
    process = multiprocessing.Process(target=exec, args=(IN_A_FORK, {}))
    process.start()
    return process
