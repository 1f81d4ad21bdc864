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
import http.client
import json
import os
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from threading import Thread
from typing import Any

from click import ClickException
from flwr.common.config import parse_config_args

from config import load_config
from errors import UserError

DEFAULT_SUPERLINK = "127.0.0.1:8000"
DEFAULT_MAX_WAIT_S = 60.0
PROBE_TIMEOUT_S = 5.0
PROBE_EVERY_S = 2.0
GRACE_S = 10.0  # for a process to end by itself after SIGTERM
CONNECTION = "superlink"  # the name of the only connection of the temporary configuration

# What Flower's numbers of Fleet API errors mean to somebody who starts a node.
REFUSALS = {
    "[code: 2001]": "it only takes nodes whose keys it knows; give one with "
    "--auth-supernode-private-key",
    "[code: 2004]": "it does not know this node's key; register its public half with "
    "`flwr supernode register`, or stop the other node that uses it",
}
# Run apart from the launcher, which would otherwise keep PyTorch in memory.
LIST_APPS = """
import environment, importlib, json, sys
module = importlib.import_module(sys.argv[1])
kinds = {name: type(value).__name__ for name, value in vars(module).items()}
print(json.dumps({n: k for n, k in kinds.items() if k in ("ClientApp", "ServerApp")}))
"""


class Refused(Exception):
    """The SuperLink answers, but not to us; trying again is pointless."""


@dataclass(frozen=True)
class Link:
    """How to reach a SuperLink: `host:port`, and TLS unless insecure."""

    address: str
    insecure: bool
    root_certificates: Path | None

    def probe(self) -> None:
        """Ask for a sign of life.

        Raises:
            OSError: nobody answers there.
            Refused: somebody does, but without TLS, only with TLS, or with a
                certificate that is not trusted.
        """
        host, _, port = self.address.rpartition(":")
        where = (host.strip("[]"), int(port))
        if self.insecure:
            connection = http.client.HTTPConnection(*where, timeout=PROBE_TIMEOUT_S)
        else:
            context = ssl.create_default_context(cafile=self.root_certificates)
            connection = http.client.HTTPSConnection(
                *where, timeout=PROBE_TIMEOUT_S, context=context
            )
        try:
            connection.request("GET", "/health")
            connection.getresponse().read()
        except ssl.SSLCertVerificationError as error:
            known = self.root_certificates or "the system's certificate authorities"
            raise Refused(
                f"its certificate is not accepted by {known} ({error.verify_message}); give the "
                "certificate authority that signed it with --root-certificates"
            ) from error
        except ssl.SSLError as error:
            raise Refused(f"it does not speak TLS ({error.reason}); use --insecure") from error
        except TimeoutError:
            raise
        except (http.client.HTTPException, ConnectionResetError) as error:
            raise Refused(
                "it closes unencrypted connections; replace --insecure by --root-certificates"
            ) from error
        finally:
            connection.close()

    def toml(self) -> str:
        """Write this link as the only connection of a Flower configuration."""
        lines = [f"[superlink.{CONNECTION}]", f"address = {json.dumps(self.address)}"]
        if self.insecure:
            lines.append("insecure = true")
        elif self.root_certificates:
            lines.append(f"root-certificates = {json.dumps(str(self.root_certificates))}")
        return "\n".join(lines) + "\n"


class Watched:
    """A child process in a group of its own, whose output is passed on line by line."""

    def __init__(self, command: Sequence[str], env: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.last_lines: deque[str] = deque(maxlen=40)
        self._pump = Thread(target=self._pass_on, daemon=True)
        self._pump.start()

    def _pass_on(self) -> None:
        for line in self.process.stdout or ():
            self.last_lines.append(line.rstrip())
            print(line, end="", flush=True)

    def wait(self, link: Link, max_wait_s: float) -> int:
        """Wait until the process ends, at most `max_wait_s` without a SuperLink.

        Returns:
            Its exit status.

        Raises:
            RuntimeError: the SuperLink has been gone for too long.
        """
        lost_since = None
        next_probe = time.monotonic() + PROBE_EVERY_S
        while self.process.poll() is None:
            time.sleep(0.1)
            if time.monotonic() < next_probe:
                continue
            next_probe = time.monotonic() + PROBE_EVERY_S
            try:
                link.probe()
                lost_since = None
            except (OSError, Refused) as error:
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since >= max_wait_s:
                    raise RuntimeError(
                        f"the SuperLink at {link.address} has been gone for {max_wait_s:g} s "
                        f"({error}); start it again, or wait longer with --max-wait-time"
                    ) from error
        self._pump.join(timeout=GRACE_S)
        return self.process.returncode

    def stop(self) -> None:
        """End the process and all that it started."""
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE_S)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def reason(self) -> str:
        """Find the line in the output that says why Flower ended."""
        for code, meaning in REFUSALS.items():
            if any(code in line for line in self.last_lines):
                return f"the SuperLink refuses this node: {meaning}"
        plain = [line.partition(":      ")[2] or line for line in self.last_lines]
        for number, line in enumerate(plain):
            if "Exit Code:" in line:
                following = [text.strip() for text in plain[number + 1 :] if text.strip()]
                return " ".join(text for text in following[:2] if "http" not in text)
        return next((line for line in reversed(plain) if line.strip()), "no output")


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
        "--port", type=int, help="of the node's own processes (default: a free one)"
    )
    given = parser.parse_args(arguments)

    def job() -> int:
        link = _check_link(given)
        node_config = check_node_config(given.node_config)
        port = free_port() if given.port is None else check_port(given.port)
        node_config["client-app"] = check_app(given.app, "clientapp")
        command = ["flower-supernode", "--superlink", link.address, "--port", str(port)]
        if link.insecure:
            command.append("--insecure")
        elif link.root_certificates:
            command += ["--root-certificates", str(link.root_certificates)]
        if given.auth_supernode_private_key:
            key = _check_file("--auth-supernode-private-key", given.auth_supernode_private_key)
            command += ["--auth-supernode-private-key", str(key)]
        await_link(link, given.max_wait_time)
        with tempfile.TemporaryDirectory() as folder:
            file = write_toml(Path(folder, "node.toml"), node_config)
            node = Watched([*command, "--node-config", str(file)], environment())
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
        link = _check_link(given)
        run_config = check_run_config(given.run_config, given.overrides)
        check_app(given.app, "serverapp")
        try:
            link.probe()
        except (OSError, Refused) as error:
            raise RuntimeError(_unreachable(link, error)) from error
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


def check_app(reference: str, component: str) -> str:
    """Check a `module:attribute` against the app that the project ships.

    Args:
        component: "clientapp" or "serverapp".

    Returns:
        The attribute.

    Raises:
        UserError: not this project's module, no such attribute, or the other kind.
    """
    module, _, attribute = reference.partition(":")
    if not module or not attribute:
        raise UserError(f"{reference}: must be module:attribute, such as app:server")
    try:
        project = tomllib.loads(Path("pyproject.toml").read_text())
        shipped = project["tool"]["flwr"]["app"]["components"][component]
    except (OSError, KeyError, tomllib.TOMLDecodeError) as error:
        raise UserError(
            f"{reference}: no Flower app in {Path.cwd()}; change to the project's directory"
        ) from error
    own = shipped.partition(":")[0]
    if module != own:
        raise UserError(f"{reference}: the apps of this project are in the module {own!r}")
    asked = subprocess.run(
        [sys.executable, "-c", LIST_APPS, module], capture_output=True, text=True
    )
    if asked.returncode:
        reason = (asked.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"{reference}: {module} can't be imported ({reason})")
    kinds = json.loads(asked.stdout.splitlines()[-1])
    kind = {"clientapp": "ClientApp", "serverapp": "ServerApp"}[component]
    known = [name for name, its in kinds.items() if its == kind]
    if attribute not in known:
        close = get_close_matches(attribute, known, n=1)
        hint = f"did you mean {module}:{close[0]}?" if close else f"known: {', '.join(known)}"
        raise UserError(f"{reference}: {module} has no {kind} {attribute!r}; {hint}")
    if component == "serverapp" and reference != shipped:
        raise UserError(f"{reference}: pyproject.toml ships {shipped}; name the other one there")
    return attribute


def check_run_config(text: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Check a run configuration and add Hydra overrides to it.

    Raises:
        UserError: not readable, an unknown key, or a wrong Hydra override.
    """
    values = _read_pairs("--run-config", text, ("hydra-overrides",))
    joined = [*shlex.split(str(values.get("hydra-overrides", ""))), *overrides]
    load_config("config", joined)
    return {"hydra-overrides": shlex.join(joined)}


def check_node_config(text: str) -> dict[str, Any]:
    """Check a node configuration, and the folder of images if it names one.

    Raises:
        UserError: not readable, an unknown key, a wrong value or folder.
    """
    flag = "--node-config"
    values = _read_pairs(flag, text, ("partition-id", "num-partitions", "data-path"))
    for key, value in values.items():
        if key != "data-path" and (type(value) is not int or value < 0):
            raise UserError(f"{flag}: {key}={value}: must be a whole number, at least 0")
    if "data-path" in values:
        folder = Path(str(values["data-path"])).expanduser().resolve()
        if not folder.is_dir() or not any(folder.iterdir()):
            wrong = "is empty" if folder.is_dir() else "is no folder"
            raise UserError(f"{flag}: data-path={folder}: {wrong}; give a folder of images")
        values["data-path"] = str(folder)
    return values


def _read_pairs(flag: str, text: str, known: Sequence[str]) -> dict[str, Any]:
    """Read pairs as Flower does, key=1 key="text", and refuse unknown keys."""
    try:
        values = parse_config_args([text])
    except (ClickException, OSError, ValueError) as error:
        reason = str(error).partition(".")[0]
        raise UserError(f'{flag}: {text}: {reason}; write key=1 key="text"') from error
    if text.strip() and not values:
        raise UserError(f'{flag}: {text}: no key=value pair; write key=1 key="text"')
    for key in values:
        if key not in known:
            close = get_close_matches(key, known, n=1) or known
            raise UserError(f"{flag}: {key}: unknown key; known: {', '.join(close)}")
    return values


def write_toml(file: Path, values: dict[str, Any]) -> Path:
    """Write numbers and texts as TOML; a basic string of TOML escapes as JSON does."""
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    return file


def environment(**changes: str) -> dict[str, str]:
    """Make the environment for Flower's commands: found beside ours, unbuffered, no calls home."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    quiet = {"FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_TELEMETRY_ENABLED": "0"}
    return {**os.environ, **quiet, "PATH": path, "PYTHONUNBUFFERED": "1", **changes}


def await_link(link: Link, max_wait_s: float) -> None:
    """Wait for the SuperLink to answer.

    Raises:
        RuntimeError: it refuses, or does not answer in time.
    """
    deadline = time.monotonic() + max_wait_s
    told = False
    while True:
        try:
            return link.probe()
        except Refused as error:
            raise RuntimeError(_unreachable(link, error)) from error
        except OSError as error:
            if time.monotonic() >= deadline:
                raise RuntimeError(_unreachable(link, error)) from error
        if not told:
            print(
                f"Waiting up to {max_wait_s:g} s for a SuperLink at {link.address} ...", flush=True
            )
            told = True
        time.sleep(min(PROBE_EVERY_S, max(0.1, deadline - time.monotonic())))


def _unreachable(link: Link, error: Exception) -> str:
    if isinstance(error, Refused):
        return f"the SuperLink at {link.address} refuses: {error}"
    reason = getattr(error, "strerror", None) or str(error)
    return (
        f"no SuperLink at {link.address} ({reason}); start one with flower-superlink, or give "
        "its address with --superlink HOST:PORT"
    )


def free_port() -> int:
    """Find a TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_port(port: int) -> int:
    """Make sure that a TCP port is free.

    Raises:
        UserError: it is not.
    """
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--port={port}: {reason}; leave it out for a free one") from error
    return port


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


def _check_link(given: argparse.Namespace) -> Link:
    """Check how the SuperLink is to be reached."""
    host, _, port = given.superlink.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--superlink={given.superlink}: must be HOST:PORT, such as 10.0.0.5:8000")
    if given.insecure and given.root_certificates:
        raise UserError("--insecure and --root-certificates exclude each other; drop one")
    if given.max_wait_time < 0:
        raise UserError(f"--max-wait-time={given.max_wait_time:g}: must be 0 or more seconds")
    certificates = given.root_certificates
    if certificates:
        certificates = _check_file("--root-certificates", certificates)
        try:
            ssl.create_default_context(cafile=certificates)
        except ssl.SSLError as error:
            raise UserError(
                f"--root-certificates={certificates}: no certificate in PEM form"
            ) from error
    return Link(given.superlink, given.insecure, certificates)


def _check_file(flag: str, file: Path) -> Path:
    if not file.expanduser().is_file():
        raise UserError(f"{flag}={file}: no such file")
    return file.expanduser().resolve()


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
