"""A federation of virtual clients in processes of Ray: the only call of Flower's simulation."""

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Event, current_thread, main_thread
from typing import Any

from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.server.superlink.fleet.vce import vce_api
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedssl.federation.resources import ClientResources

Serve = Callable[[Grid, Event, Mapping[int, int]], None]
REGISTER = "_register_nodes"  # Flower's own step, which deals partitions out to nodes
LOOK_EVERY_S = 0.1


def simulate(
    serve: Serve, clients: ClientApp, num_clients: int, resources: ClientResources
) -> None:
    """Run a server against virtual clients until it returns or fails.

    Args:
        serve: the server's work; the event is set when the clients are gone, so
            that nobody waits for them. The mapping gives the partitions of nodes: ten
            thousand of them need not be asked.
        resources: what each client's process gets.
    """
    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # failures are shown by the round
    backend: dict[str, Any] = {
        "client_resources": {  # Flower hands them on as the options of Ray's actors
            "num_cpus": resources.num_cpus,
            "num_gpus": resources.num_gpus,
            "max_restarts": -1,  # a process that died comes back for the next client
        },
    }
    _start_ray(resources)
    server, stop = ServerApp(), Event()
    with _dealt_out() as partition_of:

        @server.main()
        def main(grid: Grid, context: Context) -> None:
            while len(partition_of) < num_clients and not stop.wait(LOOK_EVERY_S):
                pass
            _start_clients(grid, list(partition_of)[: resources.at_a_time], stop)
            serve(grid, stop, partition_of)

        try:
            run_simulation(server, clients, num_clients, "ray", backend)
        finally:
            stop.set()


def _start_clients(grid: Grid, nodes: Sequence[int], stop: Event) -> None:
    """Let every process open its images, whose time would count for the first round.

    Args:
        nodes: as many as there are processes.
        stop: see `simulate`.
    """
    messages = [Message(RecordDict(), node, MessageType.QUERY) for node in nodes]
    waiting = set(grid.push_messages(messages))
    while waiting and not stop.wait(LOOK_EVERY_S):
        waiting -= {r.metadata.reply_to_message_id for r in grid.pull_messages(waiting)}


@contextmanager
def _dealt_out() -> Iterator[dict[int, int]]:
    """Learn which partitions Flower gives to its virtual nodes; it tells only these themselves."""
    partition_of: dict[int, int] = {}
    register: Callable[..., Mapping[int, int]] = getattr(vce_api, REGISTER)

    def note(*args: Any, **kwargs: Any) -> Mapping[int, int]:
        partition_of.update(register(*args, **kwargs))
        return partition_of

    setattr(vce_api, REGISTER, note)
    try:
        yield partition_of
    finally:
        setattr(vce_api, REGISTER, register)


def _start_ray(resources: ClientResources) -> None:
    """Start Ray on this machine, unless a cluster was joined.

    Flower would do it, too; but Ray then keeps SIGTERM to itself.

    Raises:
        RuntimeError: it does not start, such as on a machine with too much to do.
    """
    import ray

    if ray.is_initialized():
        return
    earlier = signal.getsignal(signal.SIGTERM)
    path = os.pathsep.join([*sys.path, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        ray.init(
            "local",  # never join somebody's cluster unasked
            num_cpus=resources.num_cpus * resources.at_a_time,
            num_gpus=resources.total_gpus,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": path}},
        )
    except Exception as error:  # Ray raises nothing more precise
        reason = str(error).strip().partition("\n")[0]
        raise RuntimeError(f"Ray did not start ({reason}); start again") from error
    finally:
        if current_thread() is main_thread():
            signal.signal(signal.SIGTERM, earlier)
