"""Flower's SuperNode as a site runs it; `flower-client-app` starts it.

    python -m fedssl.deployment.supernode [--only-bundle SHA256] [--certificate FILE]
        [--parent-pid PID] ARGUMENTS OF flower-supernode

Five things of Flower are replaced, each in one function that says why.
"""

import argparse
import hashlib
import logging
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.supercore.constant import TaskType
from flwr.supercore.exit import ExitCode, flwr_exit
from flwr.supercore.fab import Fab
from flwr.supercore.run import Run
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.cli.flower_supernode import flower_supernode
from flwr.supernode.fleet_http_client import FleetHttpClient

from fedssl.deployment.bundle import BadBundle, digest_of, names_of
from fedssl.pulling import pull_soon

SUPEREXEC = "fedssl.deployment.superexec"
POLL_EVERY_S = 0.5
WATCH_EVERY_S = 0.5
GRACE_S = 3.0  # between the request to end and the kill
SHOWN = 12  # digits of a digest in a line
log = logging.getLogger("flwr")


class ForeignRun(Exception):
    """A run that this node takes no part in, and why."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run Flower's own command with what a site adds to it."""
    parser = argparse.ArgumentParser("fedssl.deployment.supernode", allow_abbrev=False)
    parser.add_argument("--only-bundle", metavar="SHA256", help="the only bundle to run")
    parser.add_argument("--certificate", type=Path, metavar="FILE", help="the TLS client's (PEM)")
    parser.add_argument("--parent-pid", type=int, metavar="PID", help="end with this process")
    given, theirs = parser.parse_known_args(arguments)
    if given.parent_pid:
        end_with(given.parent_pid)
    pull_eagerly(given.only_bundle)
    fork_for_messages()
    pull_soon()
    if given.certificate:
        present_certificate(given.certificate)
    sys.argv = ["flower-supernode", *theirs]
    flower_supernode()
    # Flower returns after an error in its main loop; its HTTP thread would keep the process.
    flwr_exit(ExitCode.SUPERNODE_CONNECTION_ERROR, "The SuperNode's main loop broke off.")


def pull_eagerly(only_bundle: str | None) -> None:
    """Replace Flower's step that pulls a message.

    Flower loads the pyproject.toml of every bundle that a run names, and later its code; it
    looks for messages every 3 s. Here a foreign run is refused before its bundle is opened,
    and the step returns with a message only, so that Flower never comes to its pause.

    Args:
        only_bundle: the digest of the only bundle that may run; None lets every one in.
    """
    pull_once: Callable[..., int | None] = start_client_internal._pull_and_store_message
    answer = start_client_internal._insert_message

    def pull(*, receive: Callable, get_run: Callable, get_fab: Callable, **rest: Any) -> int:
        guard = Guard(receive, get_run, get_fab, only_bundle)
        calls = {"receive": guard.receive, "get_run": guard.get_run, "get_fab": guard.get_fab}
        while True:
            try:
                run_id = pull_once(**calls, **rest)
            except ForeignRun as refusal:
                assert guard.message is not None
                run_id = guard.message.metadata.run_id
                log.error("Refused run %s: %s", run_id, refusal)
                reply = Message(Error(ErrorCode.INVALID_FAB, str(refusal)), reply_to=guard.message)
                answer(reply, rest["state"], rest["object_store"])
            if run_id is not None:
                return run_id
            time.sleep(POLL_EVERY_S)

    start_client_internal._pull_and_store_message = pull  # type: ignore[assignment]


class Guard:
    """Flower's three calls to the SuperLink, through which a run comes in.

    Attributes:
        message: the latest one received.
    """

    def __init__(
        self, receive: Callable, get_run: Callable, get_fab: Callable, only_bundle: str | None
    ) -> None:
        self.message: Message | None = None
        self._receive, self._get_run, self._get_fab = receive, get_run, get_fab
        self._only_bundle = only_bundle
        self._run: Run | None = None

    def receive(self) -> Any:
        """Receive a message, and keep it for the answer."""
        if (received := self._receive()) is not None:
            self.message = received[0]
        return received

    def get_run(self, run_id: int) -> Run:
        """Ask for a message's run.

        Raises:
            ForeignRun: it is not the run of a ServerApp.
        """
        run = self._get_run(run_id)
        if self._only_bundle and run.primary_task_type != TaskType.SERVER_APP:
            raise ForeignRun(f"this node runs no {run.primary_task_type or 'unknown task'}")
        self._run = run
        return run

    def get_fab(self, fab_hash: str, run_id: int) -> Fab:
        """Download a run's bundle.

        Raises:
            ForeignRun: it is not the site's own, or not the one that the run names.
        """
        fab = self._get_fab(fab_hash, run_id)
        if self._only_bundle:
            assert self._run is not None
            check_bundle(fab, self._run, self._only_bundle)
        return fab


def check_bundle(fab: Fab, run: Run, only_bundle: str) -> None:
    """Make sure that a run's bundle holds the files that the site installed.

    Flower finds the unpacked bundle by the run's name, version and hash, so these have to
    be the bundle's own.

    Raises:
        ForeignRun: it differs.
    """
    named = f"the app {run.fab_id!r} {run.fab_version!r}"
    try:
        digest = digest_of(fab.content)
    except BadBundle as error:
        raise ForeignRun(f"the bundle of {named}: {error}") from error
    if digest != only_bundle:
        raise ForeignRun(
            f"the bundle of {named} has the digest {digest[:SHOWN]}, this site installed "
            f"{only_bundle[:SHOWN]}"
        )
    names = names_of(fab.content)
    true_hash = hashlib.sha256(fab.content).hexdigest()
    if names != (run.fab_id, run.fab_version) or {fab.hash_str, run.fab_hash} != {true_hash}:
        raise ForeignRun(f"the bundle of {named} is {names[0]} {names[1]}, {true_hash[:SHOWN]}")


def fork_for_messages() -> None:
    """Replace Flower's superexec by one whose ClientApps need not import PyTorch each time."""
    plain = subprocess.Popen

    def start(command: Sequence[str]) -> subprocess.Popen:
        own = [sys.executable, "-c", f"from {SUPEREXEC} import main; main()"]
        return plain([*own, *command[1:]] if command[0] == "flower-superexec" else command)

    start_client_internal.subprocess = SimpleNamespace(Popen=start)  # type: ignore[assignment]


def present_certificate(file: Path) -> None:
    """Replace Flower's HTTP client by one with a TLS client certificate, which Flower lacks."""

    class CertifiedClient(FleetHttpClient):
        def __init__(self, base_url: str, *, verify: Any = True, **rest: Any) -> None:
            context = verify
            if not isinstance(verify, ssl.SSLContext):
                known = verify if isinstance(verify, str) else None
                context = ssl.create_default_context(cafile=known)
            context.load_cert_chain(file)
            super().__init__(base_url, verify=context, **rest)

    fleet_http_connection.FleetHttpClient = CertifiedClient  # type: ignore[misc]


def end_with(parent_pid: int) -> None:
    """End this process and all of its group when its parent has died, however that died.

    Flower's superexec and the processes of ClientApps watch their own parents only.
    """

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(WATCH_EVERY_S)
        threading.Thread(target=kill_group, daemon=False).start()  # outlives the main thread
        os.kill(os.getpid(), signal.SIGTERM)  # Flower says goodbye to the SuperLink

    def kill_group() -> None:
        time.sleep(GRACE_S)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
