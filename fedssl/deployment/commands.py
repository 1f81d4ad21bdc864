"""The commands `flower-client-app` and `flower-server-app`.

Flower once shipped both; today `flower-supernode` runs clients and `flwr run`
submits servers. These are thin layers over the two: they check what was given,
watch that the SuperLink is still there, and end with one line and a status.

    flower-superlink --insecure
    flower-client-app app:client1 --insecure
    flower-client-app app:client2 --insecure
    flower-server-app app:server --insecure
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
from fedssl.deployment.superlink import CONNECTION, Link, Refused, Watched, await_link, unreachable
from fedssl.errors import UserError

DEFAULT_SUPERLINK = "127.0.0.1:8000"
DEFAULT_MAX_WAIT_S = 60.0
FAST = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1"}  # seconds; Flower's superexec takes 1


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

    def job() -> int:
        link = check_link(given)
        node_config = check_node_config(given.node_config)
        port = free_port() if given.port is None else check_port(given.port)
        node_config["client-app"] = check_app(given.app, "clientapp")
        command = [sys.executable, "-m", "fedssl.deployment.supernode"]
        command += ["--parent-pid", str(os.getpid())]
        if not given.any_app:
            command += ["--only-bundle", own_digest(Path.cwd())]
        if given.certificate:
            command += ["--certificate", str(check_file("--certificate", given.certificate))]
        command += ["--superlink", link.address, "--port", str(port)]
        if link.insecure:
            command.append("--insecure")
        elif link.root_certificates:
            command += ["--root-certificates", str(link.root_certificates)]
        if given.auth_supernode_private_key:
            key = check_file("--auth-supernode-private-key", given.auth_supernode_private_key)
            command += ["--auth-supernode-private-key", str(key)]
        await_link(link, given.max_wait_time)
        with tempfile.TemporaryDirectory() as folder:
            file = write_toml(Path(folder, "node.toml"), node_config)
            node = Watched([*command, "--node-config", str(file)], environment(**FAST))
            try:
                status = node.wait(link, given.max_wait_time)
            finally:
                node.stop()
        if status:
            raise RuntimeError(node.reason())
        return 0

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

    def job() -> int:
        link = check_link(given)
        run_config = check_run_config(given.run_config, given.overrides)
        check_app(given.app, "serverapp")
        try:
            link.probe()
        except (OSError, Refused) as error:
            raise RuntimeError(unreachable(link, error)) from error
        with tempfile.TemporaryDirectory() as home:
            Path(home, "config.toml").write_text(link.toml())
            file = write_toml(Path(home, "run.toml"), run_config)
            return _run(link, file, given.max_wait_time, environment(FLWR_HOME=home))

    sys.exit(_guard(job))


def _run(link: Link, run_config: Path, max_wait_s: float, env: dict[str, str]) -> int:
    """Submit, follow and judge a run, with a Flower configuration of our own."""
    submit = ["flwr", "run", ".", CONNECTION, "--format", "json"]
    run_id = str(_flwr([*submit, "--run-config", str(run_config)], env)["run-id"])
    print(f"Run {run_id} is on its way.", flush=True)
    stream = Watched(["flwr", "log", run_id, CONNECTION, "--stream"], env)
    try:
        if stream.wait(link, max_wait_s):
            raise RuntimeError(f"the log of run {run_id} broke off: {stream.reason()}")
    except KeyboardInterrupt:
        subprocess.run(["flwr", "stop", run_id, CONNECTION], env=env, capture_output=True)
        print("stopped the run", file=sys.stderr)
        raise
    finally:
        stream.stop()
    deadline = time.monotonic() + max_wait_s
    while True:
        answer = _flwr(["flwr", "list", CONNECTION, "--run-id", run_id, "--format", "json"], env)
        facts = answer["runs"][0]
        if facts["status"].startswith("finished") or time.monotonic() > deadline:
            break
        time.sleep(1)
    if facts["status"] != "finished:completed":
        details = facts["status-details"].removeprefix("ServerApp failed with exception: ")
        raise RuntimeError(f"run {run_id} is {facts['status']}: {details or 'no reason given'}")
    return 0


def _flwr(command: Sequence[str], env: dict[str, str]) -> dict:
    """Run a flwr command that answers in JSON.

    Raises:
        RuntimeError: it failed; with its own words.
    """
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    start = done.stdout.find("{")
    answer = json.loads(done.stdout[start:]) if start >= 0 else {}
    if done.returncode or not answer.get("success"):
        words = answer.get("error-message") or done.stderr or done.stdout
        words = " ".join(words.replace("│", " ").strip("╭─╮╰╯ \n").split())
        raise RuntimeError(f"{' '.join(command[:2])}: {words}")
    return answer


def write_toml(file: Path, values: dict[str, Any]) -> Path:
    """Write numbers and texts as TOML; a basic string of TOML escapes as JSON does."""
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    return file


def environment(**changes: str) -> dict[str, str]:
    """Make the environment for Flower's commands: found beside ours, unbuffered, no calls home."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    quiet = {"FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_TELEMETRY_ENABLED": "0"}
    return {**os.environ, **quiet, "PATH": path, "PYTHONUNBUFFERED": "1", **changes}


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


def _guard(job: Callable[[], int]) -> int:
    """Run a job; end with one line for what went wrong, and its status."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return job()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
