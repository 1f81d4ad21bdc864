"""A federation of virtual clients in processes of Ray: the only call of Flower's simulation."""

import logging
import os
import signal
import sys
from collections.abc import Callable
from threading import Event, current_thread, main_thread
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
    }
    _start_ray(resources)
    server, stop = ServerApp(), Event()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        serve(grid, stop)

    try:
        run_simulation(server, clients, num_clients, "ray", backend)
    finally:
        stop.set()


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
