"""A run as its operator sees it, over the SuperLink's Control API: started, followed, stopped.

In process: `flwr run`, `flwr log` and `flwr list` take seconds each to start.
"""

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
from flwr.cli.cli_client_interceptor import CliClientHttpInterceptor
from flwr.common.serde import fab_to_proto, run_from_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListRunsRequest,
    StartRunRequest,
    StopRunRequest,
    StreamLogsRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.run import RunStatus

from fedssl.deployment.bundle import build
from fedssl.deployment.superlink import SuperLinkAddress, Watch

LOOK_EVERY_S = 0.1
CLOSED = (
    "runs are started on its own machine only, at the address that it listens on; give that one "
    "with --superlink"
)
LOST = (httpx.TransportError, ValueError)  # ValueError: a frame of the log that broke off


class RunUnknown(RuntimeError):
    """The SuperLink knows no such run: it has started anew."""


class Control:
    """The Control API of one SuperLink."""

    def __init__(self, link: SuperLinkAddress) -> None:
        certificates = link.root_certificates
        self._client = ControlHttpClient.from_server_address(
            server_address=link.address,
            insecure=link.insecure,
            root_certificates=str(certificates) if certificates else None,
            interceptors=[
                CliClientHttpInterceptor(),
                RuntimeVersionHttpInterceptor(component_name="flwr CLI"),
            ],
        )
        self._link = link

    def start_run(self, project: Path, run_config: dict[str, Any]) -> int:
        """Submit a project's app; give the number of the run.

        Raises:
            RuntimeError: the SuperLink refuses it.
            UserError: there is no app in that folder.
        """
        content = build(project)
        fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
        request = StartRunRequest(
            fab=fab_to_proto(fab), override_config=user_config_to_proto(run_config)
        )
        with self._in_words():
            answer = self._client.StartRun(request)
        if not answer.HasField("run_id"):
            raise RuntimeError(
                f"the SuperLink at {self._link.address} starts no run: {answer.note}"
            )
        return answer.run_id

    def status(self, run_id: int) -> RunStatus:
        """Ask how a run stands.

        Raises:
            RunUnknown: the SuperLink has lost it.
            RuntimeError: the SuperLink refuses to say, or is gone.
        """
        with self._in_words():
            answer = self._client.ListRuns(ListRunsRequest(run_id=run_id))
        return run_from_proto(answer.run_dict[run_id]).status

    def stop(self, run_id: int) -> None:
        """Stop a run, if it still goes on.

        Raises:
            RuntimeError: the SuperLink is gone.
        """
        with self._in_words():
            self._client.StopRun(StopRunRequest(run_id=run_id))

    def print_log(self, run_id: int, after: float) -> Iterator[float]:
        """Print a run's log as it comes, until the SuperLink ends it.

        Args:
            after: the time stamp to go on from, in seconds.

        Yields:
            The time stamp of what is printed so far.
        """
        request = StreamLogsRequest(run_id=run_id, after_timestamp=after)
        for piece in self._client.StreamLogs(request):
            print(piece.log_output, end="", flush=True)
            yield piece.latest_timestamp

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPStatusError as error:
            said = FlowerError.from_json(error.response.text)
            if said and said.code == ApiErrorCode.RUN_ID_NOT_FOUND:
                raise RunUnknown(said.message) from error
            unsaid = f"leave the proxy out with no_proxy={self._link.host}"
            unsaid = unsaid if self._link.proxy else CLOSED
            details = f"{said.message} {said.public_details or ''}" if said else unsaid
            code = error.response.status_code
            raise RuntimeError(
                f"the SuperLink at {self._link.address}{self._link.proxy} answers {code}: "
                f"{' '.join(details.split())}"
            ) from error
        except httpx.TransportError as error:
            raise RuntimeError(
                f"the SuperLink at {self._link.address}{self._link.proxy} is gone ({error})"
            ) from error


class FollowedRun:
    """A run that was submitted, until its end."""

    def __init__(self, control: Control, link: SuperLinkAddress, run_id: int) -> None:
        self._control, self._link, self._run_id = control, link, run_id
        self._printed_up_to = 0.0
        self._was_lost = False

    def follow(self, max_wait_s: float) -> None:
        """Print the log until the run ends, also over a restart of the SuperLink.

        Raises:
            RuntimeError: it did not complete, or the SuperLink is gone for too long.
        """
        watch = Watch(self._link, max_wait_s)
        while True:
            self._print(watch)
            status = self._await_status(watch)
            if status.status == "finished":
                break
            time.sleep(LOOK_EVERY_S)
        if status.sub_status != "completed":
            state = f"{status.status}:{status.sub_status}"
            details = status.details.removeprefix("ServerApp failed with exception: ")
            if self._was_lost:
                raise RuntimeError(self._lost(f"it is {state}: {details or 'no reason given'}"))
            raise RuntimeError(f"run {self._run_id} is {state}: {details or 'no reason given'}")

    def _print(self, watch: Watch) -> None:
        """Print the log until it ends or breaks off."""

        def print_all() -> None:
            with suppress(httpx.HTTPStatusError, *LOST):
                for time_stamp in self._control.print_log(self._run_id, self._printed_up_to):
                    self._printed_up_to = time_stamp

        reader = Thread(target=print_all, daemon=True)  # waits for ever if a machine is gone
        reader.start()
        while reader.is_alive():
            reader.join(LOOK_EVERY_S)
            watch.look()

    def _await_status(self, watch: Watch) -> RunStatus:
        told = False
        while True:
            try:
                return self._control.status(self._run_id)
            except RunUnknown as error:
                raise RuntimeError(self._lost("it does not know the run any more")) from error
            except RuntimeError as error:
                self._was_lost = True
                if not told:
                    print(f"{error}; waiting for it ...", flush=True)
                    told = True
            watch.look()
            time.sleep(LOOK_EVERY_S)

    def _lost(self, how: str) -> str:
        return (
            f"run {self._run_id} was lost when the SuperLink at {self._link.address} went away "
            f"({how}); give the same command again with resume=latest"
        )
