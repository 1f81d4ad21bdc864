"""Which machines there are, and how simulated clients share them."""

import importlib
import logging
import math
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedssl.compute import count_cores
from fedssl.env import RAY_PROTECTION, ROOT
from fedssl.errors import UserError

CONNECT_TIMEOUT_S = 5.0
# Cautious: two cores were 1.77 (digits) to 1.87 times (CIFAR-10) as fast as one, not 1.68.
THREAD_SCALING = 0.75
# What Ray takes to the other machines is the project, not what lies beside it.
NOT_TAKEN = [".git", ".venv", ".ci", "outputs", "results", "images", "tests", "certificates"]


@dataclass(frozen=True)
class Machine:
    """What a machine offers: CPU cores and GPUs."""

    cores: int
    gpus: int
    name: str = ""


@dataclass(frozen=True)
class ClientResources:
    """What each simulated client gets, and how many run at a time.

    Attributes:
        num_cpus, num_gpus: per client process.
        total_gpus: of all machines, 0 if the clients use none.
        places: how many client processes each of several machines holds, and its name.
    """

    num_cpus: int
    num_gpus: float
    total_gpus: int
    at_a_time: int
    places: tuple[tuple[int, str], ...] = ()

    def __str__(self) -> str:
        clients = f"{self.at_a_time} client{'s' if self.at_a_time > 1 else ''}"
        cores = f"{self.num_cpus} CPU core{'s' if self.num_cpus > 1 else ''}"
        share = f" and {self.num_gpus:g} GPU" if self.num_gpus else ""
        where = ", ".join(f"{count} on {name}" for count, name in self.places)
        return f"{clients} at a time, each on {cores}{share}" + (f":\n{where}" if where else "")


def find_machines(ray_address: str | None) -> list[Machine]:
    """List this machine, or those of a running Ray cluster, which is joined.

    Args:
        ray_address: of the cluster, HOST:PORT, or "auto" for the one that was
            started on this machine; None for no cluster.

    Raises:
        UserError: no cluster answers there, or this machine can't reach itself.
    """
    if ray_address is None:
        _check_loopback()
        return [Machine(count_cores(), torch.cuda.device_count())]
    import ray

    if not ray.is_initialized():
        _join_cluster(ray_address)
    machines = []
    for node in ray.nodes():
        has = node["Resources"]
        if node["Alive"] and (cores := int(has.get("CPU", 0))):
            machines.append(Machine(cores, int(has.get("GPU", 0)), node["NodeManagerHostname"]))
    return machines


def _check_loopback() -> None:
    """Make sure that processes of this machine reach each other; Ray would try for minutes."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise UserError(
            f"127.0.0.1: this machine can't reach itself ({error.strerror}), which the clients' "
            "processes have to; bring its loopback interface up, as with `ip link set lo up`"
        ) from error


def _join_cluster(address: str) -> None:
    """Connect to a Ray cluster and take the project's files along to its machines."""
    import ray

    advice = "start one with `ray start --head --port=6379`, or leave ray_address out"
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise UserError(f"ray_address={address}: must be HOST:PORT or auto")
        try:
            socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
        except (OSError, OverflowError) as error:
            raise UserError(f"ray_address={address}: no answer ({error}); {advice}") from error
    _follow_cluster()
    try:
        ray.init(
            address,
            runtime_env={"working_dir": str(ROOT), "excludes": NOT_TAKEN},
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"ray_address={address}: can't be joined ({reason}); {advice}") from error


def _follow_cluster() -> None:
    """Take back the token and the address that were chosen for a Ray of one's own.

    Ray read them when it was imported.
    """
    from ray._private import ray_constants

    compiled: Any = importlib.import_module("ray._raylet")

    for name in RAY_PROTECTION:
        os.environ.pop(name, None)
    if RAY_PROTECTION:
        ray_constants.ENABLE_RAY_CLUSTER = ray_constants.env_bool(
            ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, not ray_constants.IS_WINDOWS_OR_OSX
        )
        compiled.AuthenticationTokenLoader.instance().reset_cache()
        compiled.Config.initialize("")


def clients_per_round(num_clients: int, fraction: float) -> int:
    """Count the clients that Flower samples for a round of training."""
    return max(1, int(fraction * num_clients))


def plan_resources(
    num_clients: int, num_cpus: int | None, num_gpus: float | None, machines: Sequence[Machine]
) -> ClientResources:
    """Share the machines among the clients; no client spans two.

    Args:
        num_clients: those that train in a round.
        num_cpus: cores per client process; None divides the cores evenly.
        num_gpus: GPU share per client process; None gives each GPU one client.

    Raises:
        UserError: more is asked for than a machine has.
    """
    cores, gpus = max(m.cores for m in machines), max(m.gpus for m in machines)
    which = "this machine" if len(machines) == 1 else "the largest machine"
    if num_cpus is not None and num_cpus > cores:
        raise UserError(f"num_cpus={num_cpus}: {which} has {cores} cores; use at most that")
    if num_gpus and gpus == 0:
        raise UserError(f"num_gpus={num_gpus}: PyTorch finds no GPU here; leave num_gpus out")
    if num_gpus and num_gpus > gpus:
        raise UserError(f"num_gpus={num_gpus}: {which} has {gpus} GPUs; use at most that")
    if num_gpus is None:
        num_gpus = 1 if gpus else 0
    slots = min(num_clients, _count_slots(machines, 1, num_gpus))
    if num_cpus is None:
        all_cores = sum(m.cores for m in machines)
        if num_gpus:
            num_cpus = min(cores, max(1, all_cores // slots))
        else:
            num_cpus = _share_cores(num_clients, slots, cores, all_cores)
    at_a_time = min(slots, _count_slots(machines, num_cpus, num_gpus))
    total_gpus = sum(m.gpus for m in machines) if num_gpus else 0
    fitting = tuple((_fits(machine, num_cpus, num_gpus), machine.name) for machine in machines)
    places = fitting if len(machines) > 1 else ()
    return ClientResources(num_cpus, num_gpus, total_gpus, at_a_time, places)


def _share_cores(num_clients: int, slots: int, cores: int, all_cores: int) -> int:
    """Choose the cores per client with which a round of all clients ends first.

    Five clients on two cores end sooner one after the other on both than two at
    a time, which leaves a core idle for the fifth.
    """

    def duration(num_cpus: int) -> float:
        waves = math.ceil(num_clients / min(slots, max(1, all_cores // num_cpus)))
        return waves / num_cpus**THREAD_SCALING

    return min(range(1, cores + 1), key=duration)


def _count_slots(machines: Sequence[Machine], num_cpus: int, num_gpus: float) -> int:
    """Count the client processes that fit on all machines, at least one."""
    return max(1, sum(_fits(machine, num_cpus, num_gpus) for machine in machines))


def _fits(machine: Machine, num_cpus: int, num_gpus: float) -> int:
    by_cores = machine.cores // num_cpus
    return min(by_cores, int(machine.gpus / num_gpus)) if num_gpus else by_cores
