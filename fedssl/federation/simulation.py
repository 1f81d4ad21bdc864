"""A federation of virtual clients in processes of Ray: the only call of Flower's simulation."""

import logging
from collections.abc import Callable
from threading import Event
from typing import Any

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedssl.federation.resources import ClientResources

Serve = Callable[[Grid, Event], None]


def simulate(
    serve: Serve, clients: ClientApp, num_clients: int, resources: ClientResources
) -> None:
    """Run a server against virtual clients until it returns or fails.

    Args:
        serve: the server's work; the event is set when the clients are gone, so
            that nobody waits for them.
        resources: what each client's process gets.
    """
    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # failures are shown by the round
    backend: dict[str, Any] = {
        "client_resources": {  # Flower hands them on as the options of Ray's actors
            "num_cpus": resources.num_cpus,
            "num_gpus": resources.num_gpus,
            "max_restarts": -1,  # a process that died comes back for the next client
        },
        "init_args": {  # without effect where a cluster was joined
            "address": "local",  # never join somebody's cluster unasked
            "num_cpus": resources.num_cpus * resources.at_a_time,
            "num_gpus": resources.total_gpus,
            "logging_level": logging.ERROR,
            "log_to_driver": False,
        },
    }
    server, stop = ServerApp(), Event()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        serve(grid, stop)

    try:
        run_simulation(server, clients, num_clients, "ray", backend)
    finally:
        stop.set()
