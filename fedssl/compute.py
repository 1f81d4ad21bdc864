"""The device, the precision, the memory and the cores that a process uses."""

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

NODE_PROGRAM, NODE_MODULE = "flower-supernode", "fedssl.deployment.supernode"
PROCESSES = Path("/proc")


@dataclass(frozen=True)
class Backend:
    """Where and how exactly a process computes.

    Attributes:
        dtype: of the autocast forward passes, float32 for none.
    """

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        """Give the context in which forward passes run."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled)

    def __str__(self) -> str:
        return f"device {self.device.type}, precision {str(self.dtype).removeprefix('torch.')}"


def choose_backend(precision: str, num_gpus: float | None = None) -> Backend:
    """Choose device and dtype, see `choose_device` and `choose_dtype`."""
    device = choose_device(num_gpus)
    return Backend(device, choose_dtype(precision, device))


def release_memory() -> None:
    """Give freed memory back to the system, which glibc may keep by the hundred megabytes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def choose_device(num_gpus: float | None = None) -> torch.device:
    """Choose CUDA where there is a GPU, unless this process was granted no share of it (0)."""
    return torch.device("cuda" if num_gpus != 0 and torch.cuda.is_available() else "cpu")


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Choose the autocast type: bfloat16 where "auto" finds hardware for it, else float32."""
    if precision != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[precision]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


@dataclass(frozen=True)
class Process:
    """A process of this machine.

    Attributes:
        started: in ticks of the system's clock since it booted.
    """

    pid: int
    parent: int
    started: int
    command: tuple[str, ...]

    @property
    def is_node(self) -> bool:
        """Whether it is a SuperNode, rather than a child or the launcher of one."""
        program, *rest = self.command or ("",)
        if Path(program).name.startswith("python"):
            while rest and rest[0].startswith("-") and rest[0] != "-m":
                del rest[: 2 if rest[0] in ("-X", "-W") else 1]
            if rest[:1] == ["-m"]:
                return rest[1:2] == [NODE_MODULE]
            program = rest[0] if rest else ""
        return Path(program).name == NODE_PROGRAM


@dataclass(frozen=True)
class CoreShare:
    """How many of a machine's cores a node takes, beside the other nodes there."""

    cores: int
    of: int
    nodes: int

    def __str__(self) -> str:
        shared = f", shared by {self.nodes} nodes" if self.nodes > 1 else ""
        return f"takes {self.cores} of {self.of} core{'s' if self.of > 1 else ''}{shared}"


def count_cores() -> int:
    """Count the CPU cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def share_cores(processes: Sequence[Process] | None = None, pid: int | None = None) -> CoreShare:
    """Share this machine's cores evenly among the SuperNodes that run on it now.

    What remains goes to those that started first, and each has one core at least. Nodes
    find each other in the system's list of processes; where there is none, or this
    process belongs to no node, it takes all cores.

    Args:
        processes: of this machine; None: those that run now.
        pid: of a process of the node that asks, by default this one.
    """
    cores = count_cores()
    known = {each.pid: each for each in (_processes() if processes is None else processes)}
    nodes = [each for each in known.values() if each.is_node]
    numbers = {node.pid for node in nodes}
    nodes = [node for node in nodes if not numbers & set(_ancestors(node.pid, known))]
    nodes.sort(key=lambda node: (node.started, node.pid))
    own = {os.getpid() if pid is None else pid}
    own |= set(_ancestors(*own, known))
    place = next((place for place, node in enumerate(nodes) if node.pid in own), None)
    if place is None:
        return CoreShare(cores, cores, 1)
    share, remainder = divmod(cores, len(nodes))
    return CoreShare(max(1, share + (place < remainder)), cores, len(nodes))


def _ancestors(pid: int, known: dict[int, Process]) -> Iterator[int]:
    """Give the parent of a process, its parent, and so on."""
    seen = {pid}
    while (process := known.get(pid)) and process.parent not in seen:
        pid = process.parent
        seen.add(pid)
        yield pid


def _processes() -> list[Process]:
    """List the processes of this machine, where the system shows them below /proc."""
    found = []
    for folder in PROCESSES.glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):  # it has ended meanwhile
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
            # after the name in parentheses, which may hold anything: state, parent, ..., start
            status = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
            if words := tuple(command.split("\0")[:-1]):
                process = Process(int(folder.name), int(status[1]), int(status[19]), words)
                found.append(process)
    return found
