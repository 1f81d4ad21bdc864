"""A SuperLink that listens on loopback, knows the nodes of nodes.yaml, and runs this app alone.

Flower's own command, in this process, with three things added at one place each: the nodes,
the app and how a restart finds the nodes.
"""

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
from flwr.server.superlink.linkstate import LinkState
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.constant import NodeStatus
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.state.schema.linkstate_models import Node
from flwr.superlink import main as superlink_main
from flwr.superlink.cli.flower_superlink import flower_superlink

from fedssl.config.roster import Member, read_roster
from fedssl.deployment.bundle import BadBundle, digest_of, own_digest
from fedssl.deployment.commands import environment
from fedssl.deployment.node import POLLING
from fedssl.errors import UserError

LOOPBACK = "127.0.0.1"
HEARTBEAT_S = 30.0  # Flower's own interval
SHOWN = 12  # digits of a digest in a line


def serve(folder: Path, port: int, database: Path | None, project: Path | None) -> None:
    """Run the SuperLink until SIGTERM or SIGINT; SIGHUP reads nodes.yaml again.

    Args:
        folder: what `python -m scripts.certificates` wrote.
        database: what a restart needs to know again (default: superlink.db in the folder).
        project: the app whose runs alone are accepted; None accepts every app.

    Raises:
        UserError: a missing file, a port in use, or no app in the project's folder.
    """
    os.umask(0o077)
    files = {name: folder / name for name in ("ca.crt", "server.crt", "server.key", "nodes.yaml")}
    for file in files.values():
        if not file.is_file():
            raise UserError(f"{file}: no such file; python -m scripts.certificates makes it")
    read_roster(files["nodes.yaml"])
    _check_port(port)
    digest = own_digest(project) if project else None

    def prepare(state: LinkState) -> None:
        for line in sync_nodes(state, read_roster(files["nodes.yaml"])):
            print(line, flush=True)
        release_nodes(state)
        if digest:
            refuse_other_apps(state, digest)
        signal.signal(signal.SIGHUP, lambda *_: _reload(state, files["nodes.yaml"]))

    _after_state(prepare)
    logging.getLogger("uvicorn.access").addFilter(_is_no_sign_of_life)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it again at its end
    os.environ.update(environment(**POLLING))
    arguments = ["--host", LOOPBACK, "--port", str(port), "--enable-supernode-auth"]
    arguments += ["--database", str((database or folder / "superlink.db").resolve())]
    for flag, name in (("ca-certfile", "ca.crt"), ("certfile", "server.crt")):
        arguments += [f"--ssl-{flag}", str(files[name])]
    arguments += ["--ssl-keyfile", str(files["server.key"])]
    sys.argv = ["flower-superlink", *arguments, "--disable-runtime-dependency-installation"]
    flower_superlink()


def _is_no_sign_of_life(record: logging.LogRecord) -> bool:
    """Leave the commands' probes, several a second, out of the log."""
    return not (isinstance(record.args, tuple) and record.args[-1] == 405)


def sync_nodes(state: LinkState, members: Iterable[Member]) -> list[str]:
    """Register the members' keys and unregister all others; say whose."""
    wanted = {member.flower_key: member.name for member in members}
    known = state.get_node_info(
        owner_aids=[NOOP_FLWR_AID],
        statuses=[NodeStatus.REGISTERED, NodeStatus.ONLINE, NodeStatus.OFFLINE],
    )
    present = {node.public_key: node for node in known}
    lines = []
    for key in present.keys() - wanted.keys():
        state.delete_node(NOOP_FLWR_AID, present[key].node_id)
        lines.append(f"Node {present[key].name or present[key].node_id} is no longer known.")
    for key, name in wanted.items():
        if key not in present:
            _register(state, key, name)
            lines.append(f"Node {name} is known.")
    return lines


def _register(state: LinkState, key: bytes, name: str) -> None:
    try:
        state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, HEARTBEAT_S, name=name)
    except ValueError:  # it was unregistered before; Flower keeps its row
        if not isinstance(state, SqlLinkState):
            raise
        with state.session() as session:
            row = session.query(Node).filter_by(public_key=key)
            row.update({"status": NodeStatus.REGISTERED, "unregistered_at": None})


def release_nodes(state: LinkState) -> None:
    """Mark the nodes of the time before a restart as offline.

    Flower lets a node connect only when it isn't connected, and takes it as connected for
    up to a minute after its last heartbeat. One that still runs is online again with its
    next heartbeat.
    """
    for node in state.get_node_info(statuses=[NodeStatus.ONLINE]):
        state.deactivate_node(node.node_id)


def refuse_other_apps(state: LinkState, digest: str) -> None:
    """Let runs of one app in only; all runs pass `store_app` or `create_run`."""
    store_app, create_run = state.store_app, state.create_run

    def checked_store_app(fab: Any, *rest: Any, **named: Any) -> str:
        _check_app(fab.content, digest)
        return store_app(fab, *rest, **named)

    def checked_create_run(
        fab_id: Any, version: Any, fab_hash: Any, *rest: Any, **named: Any
    ) -> int:
        fab = state.get_fab(fab_hash) if fab_hash else None
        _check_app(fab.content if fab else b"", digest)
        return create_run(fab_id, version, fab_hash, *rest, **named)

    state.store_app = checked_store_app  # type: ignore[method-assign]
    state.create_run = checked_create_run  # type: ignore[method-assign, assignment]


def _check_app(content: bytes, digest: str) -> None:
    try:
        theirs = digest_of(content)
    except BadBundle as error:
        theirs, found = "", f"no app that can be read ({error})"
    else:
        found = f"digest {theirs[:SHOWN]}"
    if theirs != digest:
        reason = (
            f"This SuperLink runs the app of its own checkout only (digest {digest[:SHOWN]}), "
            f"and this one is another ({found}); --any-app lets it in."
        )
        raise FlowerError(ApiErrorCode.FORBIDDEN_ACTION, reason, public_details=reason)


def _after_state(prepare: Callable[[LinkState], None]) -> None:
    """Have Flower call us when its state is there and its port isn't open yet."""
    create_app = superlink_main.create_app

    def create(*given: Any, **named: Any) -> Any:
        app = create_app(*given, **named)
        prepare(app.state.linkstate_factory.state())
        return app

    superlink_main.create_app = create


def _reload(state: LinkState, file: Path) -> None:
    def read() -> None:
        try:
            for line in sync_nodes(state, read_roster(file)):
                print(line, flush=True)
            print(f"{file} is read.", flush=True)
        except UserError as error:
            print(f"error: {error}; the nodes are as before", file=sys.stderr, flush=True)

    threading.Thread(target=read).start()  # a signal handler must not wait for the database


def _check_port(port: int) -> None:
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((LOOPBACK, port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--port={port}: {reason}; choose another") from error
