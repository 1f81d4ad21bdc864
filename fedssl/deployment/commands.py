"""The commands `flower-client-app` and `flower-server-app`.

Flower once shipped both; today `flower-supernode` runs clients and `flwr run`
submits servers. These do the same: they check what was given, watch that the
SuperLink is still there, and end with one line and a status.

    flower-superlink --insecure
    flower-client-app app:client1 --insecure
    flower-client-app app:client2 --insecure
    flower-server-app app:server --insecure
"""

import argparse
import ipaddress
import json
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import getproxies

import httpx

from fedssl.deployment.bundle import own_digest
from fedssl.deployment.checks import (
    check_app,
    check_file,
    check_link,
    check_node_config,
    check_port,
    check_run_config,
    free_port,
)
from fedssl.deployment.control import Control, FollowedRun
from fedssl.deployment.node import POLLING, Node
from fedssl.deployment.superlink import (
    ConnectionRefused,
    SuperLinkAddress,
    hide_password,
    unreachable,
)
from fedssl.errors import WARNING, UserError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
DEFAULT_SUPERLINK = "127.0.0.1:8000"
DEFAULT_MAX_WAIT_S = 60.0


def client_app(arguments: Sequence[str] | None = None) -> None:
    """Run `flower-client-app`: one SuperNode, until it is stopped."""
    parser = _parser("flower-client-app", "app:client1", "a ClientApp")
    parser.add_argument(
        "--node-config",
        default="",
        metavar="TEXT",
        help="such as 'partition-id=0 num-partitions=2' or 'data-path=\"DIR\"'",
    )
    parser.add_argument(
        "--auth-supernode-private-key", type=Path, metavar="FILE", help="the node's private key"
    )
    parser.add_argument(
        "--certificate",
        type=Path,
        metavar="FILE",
        help="the node's TLS client certificate and its key (PEM), for a SuperLink behind a proxy",
    )
    parser.add_argument(
        "--any-app",
        action="store_true",
        help="run whatever app the SuperLink sends, not only the one installed here",
    )
    parser.add_argument(
        "--port", type=int, help="of the node's own processes (default: a free one)"
    )
    given = parser.parse_args(arguments)

    def job() -> None:
        os.umask(0o077)  # a node's cache holds images; its children inherit this
        link = check_link(given)
        pass_proxies(link)
        node_config = check_node_config(given.node_config)
        port = free_port() if given.port is None else check_port(given.port)
        node_config["client-app"] = check_app(given.app, "clientapp")
        arguments = [] if given.any_app else ["--only-bundle", own_digest(Path.cwd())]
        if link.certificate:
            arguments += ["--certificate", str(link.certificate)]
        arguments += ["--superlink", link.address, "--port", str(port)]
        if link.insecure:
            arguments.append("--insecure")
        elif link.root_certificates:
            arguments += ["--root-certificates", str(link.root_certificates)]
        key = given.auth_supernode_private_key
        if key:
            key = check_file("--auth-supernode-private-key", key)
            arguments += ["--auth-supernode-private-key", str(key)]
            node_config.setdefault("signing-key", str(key.absolute()))
        warn_if_insecure(link)
        with tempfile.TemporaryDirectory() as folder:
            file = write_toml(Path(folder, "node.toml"), node_config)
            arguments += ["--node-config", str(file)]
            Node(arguments, environment(**POLLING), link, given.max_wait_time, key).run()

    sys.exit(_guard(job))


def server_app(arguments: Sequence[str] | None = None) -> None:
    """Run `flower-server-app`: submit the run, show its log, tell how it ended."""
    parser = _parser("flower-server-app", "app:server", "the ServerApp")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides, such as num_rounds=3"
    )
    parser.add_argument(
        "--run-config",
        default="",
        metavar="TEXT",
        help="as of flwr run, such as 'hydra-overrides=\"num_rounds=3\"'",
    )
    given = parser.parse_intermixed_args(arguments)

    def job() -> None:
        link = check_link(given)
        pass_proxies(link)
        run_config = check_run_config(given.run_config, given.overrides)
        check_app(given.app, "serverapp")
        try:
            link.probe()
        except (OSError, ConnectionRefused) as error:
            raise RuntimeError(unreachable(link, error)) from error
        warn_if_insecure(link)
        control = Control(link)
        run_id = control.start_run(Path.cwd(), run_config)
        print(f"Run {run_id} is on its way.", flush=True)
        try:
            FollowedRun(control, link, run_id).follow(given.max_wait_time)
        except KeyboardInterrupt:
            with suppress(RuntimeError):  # it has ended, or its SuperLink is gone
                control.stop(run_id)
                print("stopped the run", file=sys.stderr)
            raise

    sys.exit(_guard(job))


def warn_if_insecure(link: SuperLinkAddress) -> None:
    """Say in one line what a connection without TLS means."""
    if link.insecure:
        print(
            f"{WARNING}--insecure: nothing is encrypted, and whoever reaches {link.address} can "
            "run code on the machines of the federation; docs/federation.md has the guarded way",
            file=sys.stderr,
            flush=True,
        )


def write_toml(file: Path, values: dict[str, Any]) -> Path:
    """Write numbers and texts as TOML; a basic string of TOML escapes as JSON does."""
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    return file


def environment(**changes: str) -> dict[str, str]:
    """Make the environment for Flower's commands: found beside ours, unbuffered, no calls home."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    quiet = {"FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_TELEMETRY_ENABLED": "0"}
    fixed = {**quiet, **without_proxy(), "PATH": path, "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **fixed, **changes}


def pass_proxies(link: SuperLinkAddress) -> None:
    """Change this process's environment so that it goes past the proxies that it need not use.

    Raises:
        UserError: a proxy is of a kind that Flower's connections do not know.
    """
    os.environ.update(without_proxy(link.host))
    for name, url in getproxies().items():
        try:
            httpx.Client(proxy=url if "://" in url else f"http://{url}").close()
        except (ValueError, ImportError, httpx.InvalidURL) as error:
            if name == "no":
                continue
            variable = f"{name}_proxy"
            raise UserError(
                f"{variable}={hide_password(url)}: Flower's connections know no such proxy, only "
                f"http://HOST:PORT; leave it out, as with `env -u {variable} -u "
                f"{variable.upper()} COMMAND`"
            ) from error


def without_proxy(host: str = "localhost") -> dict[str, str]:
    """Give the variables that lead past an HTTP proxy to this machine and to a private address."""
    given = ",".join(os.environ.get(name, "") for name in ("NO_PROXY", "no_proxy"))
    names = [*filter(None, map(str.strip, given.split(","))), *LOOPBACK]
    names += [host] if _is_near(host) else []
    joined = ",".join(dict.fromkeys(names))
    return {"NO_PROXY": joined, "no_proxy": joined}


def _is_near(host: str) -> bool:
    """Tell whether all addresses of a host are private, so that no proxy leads there."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:  # a name that only a proxy knows
        return False
    return not any(ipaddress.ip_address(address.split("%")[0]).is_global for address in found)


def _parser(name: str, example: str, kind: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(name, allow_abbrev=False)
    parser.add_argument("app", metavar="MODULE:ATTRIBUTE", help=f"{kind}, such as {example}")
    parser.add_argument("--insecure", action="store_true", help="connect without TLS")
    parser.add_argument(
        "--root-certificates",
        type=Path,
        metavar="FILE",
        help="certificate authority of the SuperLink (PEM; default: the system's)",
    )
    parser.add_argument(
        "--superlink",
        default=DEFAULT_SUPERLINK,
        metavar="HOST:PORT",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--max-wait-time",
        type=float,
        default=DEFAULT_MAX_WAIT_S,
        metavar="SECONDS",
        help="how long to do without a SuperLink before giving up (default: %(default)g)",
    )
    return parser


def _guard(job: Callable[[], None]) -> int:
    """Run a job; end with one line for what went wrong, and its status."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        job()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _interrupt(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough; the children are to be ended
    raise KeyboardInterrupt
