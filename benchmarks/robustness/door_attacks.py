"""What strangers and insiders try at the door and at the SuperLink behind it.

Each attack is a function of a running `Federation` that gives what was seen, and a pattern
that this has to match.
"""

import http.client
import re
import shutil
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from flwr.proto.control_pb2 import ListNodesRequest, ListNodesResponse
from flwr.proto.fleet_pb2 import PullMessagesRequest, RegisterNodeFleetRequest
from flwr.proto.node_pb2 import Node

from benchmarks.robustness.guarded_federation import (
    Caller,
    Federation,
    expired_certificate,
    outside_address,
    sign,
)
from fedssl.deployment.certificates import make_certificates
from fedssl.deployment.members import remove_nodes
from fedssl.env import ROOT

PULL = "/v1/fleet/pull-messages"
PUSH = "/v1/fleet/push-object"
NO_CERTIFICATE = r"status 400$|^no connection"  # nginx answers so when a certificate lacks or fails


@dataclass(frozen=True)
class Attack:
    """An attack, and a regular expression for what has to be seen."""

    name: str
    expected: str
    run: Callable[[Federation], str]

    def held(self, seen: str) -> bool:
        """Tell whether the attack was refused as it should be."""
        return re.search(self.expected, seen) is not None


def _status(caller: Caller, path: str, body: bytes = b"", method: str = "POST") -> str:
    try:
        return f"status {caller.ask(path, body, method)}"
    except (ssl.SSLError, ConnectionError, http.client.RemoteDisconnected) as error:
        return f"no connection ({type(error).__name__})"


def _insider(federation: Federation, name: str = "node1", key: str | None = None) -> Caller:
    folder = federation.certificates
    return Caller(federation, folder / f"{name}.pem", folder / (key or name))


def _flwr(federation: Federation, *command: str, cwd: Path = ROOT) -> str:
    """Run Flower's command; give its status and the words of its box on one line."""
    status, output = federation.run("flwr", *command, cwd=cwd)
    words = " ".join(re.sub(r"[╭╮╰╯│─]", " ", output).split())
    return f"exit {status}: {words[-600:]}"


def foreign_app(folder: Path) -> Path:
    """Write an app that leaves a file where its ServerApp runs."""
    folder.mkdir(exist_ok=True)
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "foreign"\nversion = "1.0.0"\ndependencies = []\n'
        '[tool.flwr.app]\npublisher = "stranger"\n'
        '[tool.flwr.app.components]\nserverapp = "evil:app"\nclientapp = "evil:client"\n'
        "[tool.flwr.app.config]\n"
    )
    (folder / "evil.py").write_text(
        "from pathlib import Path\n"
        f"Path({str(folder / 'it ran')!r}).touch()\n"
        "from flwr.app import Context\nfrom flwr.clientapp import ClientApp\n"
        "from flwr.serverapp import ServerApp\n"
        "app = ServerApp()\nclient = ClientApp()\n"
        "@app.main()\ndef main(grid, context: Context) -> None: pass\n"
    )
    return folder


def changed_copy(folder: Path) -> Path:
    """Copy this app and change one line; name and version stay."""
    if not folder.exists():
        skip = shutil.ignore_patterns(".git", "results", "images", "outputs", "tests", ".venv")
        shutil.copytree(ROOT, folder, ignore=skip)
        with (folder / "client.py").open("a") as file:
            file.write('print("changed")\n')
    return folder


def run_foreign_app(federation: Federation) -> str:
    """A stranger submits an app through the door."""
    return _flwr(federation, "run", str(foreign_app(federation.folder / "foreign")), "door")


def run_foreign_app_inside(federation: Federation) -> str:
    """Somebody on the server's machine submits another app."""
    app = foreign_app(federation.folder / "foreign")
    seen = _flwr(federation, "run", str(app), "inside")
    ran = " IT RAN" if (app / "it ran").exists() else ""
    lives = _flwr(federation, "supernode", "list", "inside").partition(":")[0]
    return f"{seen}{ran}; then supernode list: {lives}"


def run_changed_app_inside(federation: Federation) -> str:
    """A changed bundle of the same name and version."""
    copy = changed_copy(federation.folder / "changed")
    return _flwr(federation, "run", str(copy), "inside", cwd=copy)


def register(federation: Federation) -> str:
    """A stranger registers a key of his own."""
    make_certificates(federation.folder / "own", [], ["stranger"], days=1)
    key = federation.folder / "own" / "stranger.pub"
    return _flwr(federation, "supernode", "register", str(key), "door")


def unregister(federation: Federation) -> str:
    """A stranger throws a node out."""
    return _flwr(federation, "supernode", "unregister", "1", "door")


def register_as_insider(federation: Federation) -> str:
    """A known node registers another key over the Fleet API."""
    body = RegisterNodeFleetRequest(public_key=b"x").SerializeToString()
    return _status(_insider(federation), "/v1/fleet/register-node", body)


def path_tricks(federation: Federation) -> str:
    """A known node asks for what it isn't allowed, with every spelling of a path."""
    paths = [
        *("/v1/control/start-run", "/v1/control/unregister-node", "/v1/runtime/acquire-task"),
        *("/openapi.json", "/docs", "/health", "/", "//v1/fleet/pull-messages", PULL + "/"),
        *("/v1//fleet/pull-messages", "/v1/fleet/../control/start-run", PULL + "?a=1"),
        *("/v1/fleet/pull-messages/../../control/start-run", "/V1/FLEET/PULL-MESSAGES"),
        *("/v1/fleet/%70ull-messages", "/v1/control/%2e%2e/fleet/pull-messages", PULL + ";x"),
        *("/v1/fleet/..%2fcontrol/start-run", "/v1/fleet/unregister-node", PULL + "%2f"),
        *("http://localhost/v1/control/start-run", "https://x/openapi.json"),
    ]
    insider = _insider(federation)
    seen = Counter(_status(insider, path) for path in paths)
    return ", ".join(f"{count} times {what}" for what, count in seen.items())


def acquire_task(federation: Federation) -> str:
    """A stranger asks for the task of the operator's run."""
    return _status(Caller(federation), "/v1/runtime/acquire-task")


def list_of_paths(federation: Federation) -> str:
    """A stranger asks for the list of all paths."""
    return _status(Caller(federation), "/openapi.json", method="GET")


def no_certificate(federation: Federation) -> str:
    """A node's key without a TLS certificate."""
    return _status(Caller(federation, None, federation.certificates / "node1"), PULL)


def expired(federation: Federation) -> str:
    """A certificate of the federation's own authority that has expired."""
    certificate = expired_certificate(federation, "node1")
    return _status(Caller(federation, certificate, federation.certificates / "node1"), PULL)


def other_authority(federation: Federation) -> str:
    """A certificate of the same name by another authority of the same name."""
    make_certificates(federation.folder / "forged", [], ["node1"], days=1)
    certificate = federation.folder / "forged" / "node1.pem"
    return _status(Caller(federation, certificate, federation.certificates / "node1"), PULL)


def server_certificate(federation: Federation) -> str:
    """The server's own certificate in the place of a client's."""
    folder, file = federation.certificates, federation.folder / "server.pem"
    file.write_bytes((folder / "server.crt").read_bytes() + (folder / "server.key").read_bytes())
    return _status(Caller(federation, file, folder / "node1"), PULL)


def key_of_another(federation: Federation) -> str:
    """A node key that was copied to another site of the federation."""
    return _status(_insider(federation, "node2", key="node1"), PULL)


def id_of_another(federation: Federation) -> str:
    """A node asks, with its own key and certificate, for the messages of another node."""
    other = node_ids(federation)["node2"]
    body = PullMessagesRequest(node=Node(node_id=other)).SerializeToString()
    return _status(_insider(federation), PULL, body)


def replayed(federation: Federation) -> str:
    """Headers of a node that were recorded: older than the window, and fresh ones of another."""
    folder = federation.certificates
    old = sign(folder / "node1", datetime.now(UTC) - timedelta(minutes=10))
    itself = Caller(federation, folder / "node1.pem", extra=old)
    other = Caller(federation, folder / "node2.pem", extra=sign(folder / "node1"))
    stranger = Caller(federation, extra=sign(folder / "node1"))
    asked = {"old": itself, "at another node": other, "at a stranger": stranger}
    return ", ".join(f"{name}: {_status(caller, PULL)}" for name, caller in asked.items())


def two_keys(federation: Federation) -> str:
    """One's own key in the first header and another's in a second one."""
    folder = federation.certificates
    first, second = sign(folder / "node1"), sign(folder / "node2")
    lines = [f"{name}: {value}" for each in (second, first) for name, value in each.items()]
    return _raw(federation, [f"POST {PULL} HTTP/1.1", *lines, "Content-Length: 0"])


def smuggled(federation: Federation) -> str:
    """A second request hidden in the first, by two lengths that disagree."""
    lines = [f"{name}: {value}" for name, value in _insider(federation).headers().items()]
    lines += ["Content-Length: 6", "Transfer-Encoding: chunked"]
    hidden = "0\r\n\r\nGET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
    return _raw(federation, [f"POST {PULL} HTTP/1.1", *lines], hidden)


def oversized(federation: Federation) -> str:
    """A body above the limit, announced and unannounced."""
    insider = _insider(federation)
    seen = [_status(insider, PUSH, bytes(65 * 2**20))]
    connection = insider.connect()
    with suppress(OSError):
        pieces = (bytes(2**20) for _ in range(80))
        connection.request("POST", PUSH, pieces, insider.headers(), encode_chunked=True)
    try:
        seen.append(f"status {connection.getresponse().status}")
    except (OSError, http.client.HTTPException) as error:
        seen.append(f"no connection ({type(error).__name__})")
    connection.close()
    return ", ".join(seen)


def flood(federation: Federation) -> str:
    """A node sends 1200 requests over 300 connections at once."""
    insider = _insider(federation)

    def storm(_: int) -> Counter[str]:
        connection, seen = insider.connect(), Counter[str]()
        with suppress(OSError, http.client.HTTPException):
            for _ in range(4):
                connection.request("POST", PULL, b"", insider.headers())
                answer = connection.getresponse()
                answer.read()
                seen[f"status {answer.status}"] += 1
        connection.close()
        return seen

    with ThreadPoolExecutor(300) as pool:
        total = sum(pool.map(storm, range(300)), Counter[str]())
    return ", ".join(f"{count} times {what}" for what, count in sorted(total.items()))


def plain_http(federation: Federation) -> str:
    """A request without TLS."""
    return _raw(federation, [f"POST {PULL} HTTP/1.1", "Content-Length: 0"], tls=False)


def control_from_outside(federation: Federation) -> str:
    """The SuperLink's own port, from another machine's point of view."""
    host = outside_address()
    if host.startswith("127."):
        return "skipped: this machine has no other address"
    caller = Caller(federation, port=federation.port, host=host)
    return _status(caller, "/v1/control/start-run")


def removed_node(federation: Federation) -> str:
    """A node that was thrown out, with its certificate and key."""
    folder, kept = federation.certificates, federation.folder / "kept"
    kept.mkdir(exist_ok=True)
    for name in ("node3", "node3.pem"):
        shutil.copy(folder / name, kept)
    caller = Caller(federation, kept / "node3.pem", kept / "node3")
    before = _status(Caller(federation, kept / "node3.pem"), PULL, method="GET")
    remove_nodes(folder, ["node3"])
    federation.write_door()
    federation.reload_door()
    federation.hang_up_superlink()
    known = ", ".join(sorted(node_ids(federation)))
    return f"{_status(caller, PULL)} (before: {before}); known: {known}"


def node_ids(federation: Federation) -> dict[str, int]:
    """Ask the SuperLink from inside which nodes it knows: their numbers by name."""
    request = ListNodesRequest().SerializeToString()
    inside = Caller(federation, port=federation.port)
    _, body = inside.exchange("/v1/control/list-nodes", request)
    nodes = ListNodesResponse.FromString(body).nodes_info
    return {node.name: node.node_id for node in nodes if node.status != "unregistered"}


def _raw(federation: Federation, lines: list[str], body: str = "", *, tls: bool = True) -> str:
    """Send bytes as they stand, as node1; give the status line of the answer."""
    address = ("127.0.0.1", federation.door_port)
    with socket.create_connection(address, timeout=30) as plain:
        connection = plain
        if tls:
            context = ssl.create_default_context(cafile=federation.ca)
            context.load_cert_chain(federation.certificates / "node1.pem")
            connection = context.wrap_socket(plain, server_hostname="localhost")
        head = [*lines, "Host: localhost", "Connection: close"]
        connection.sendall(("\r\n".join(head) + "\r\n\r\n" + body).encode())
        answer = b""
        with suppress(OSError):
            while piece := connection.recv(65536):
                answer += piece
    statuses = re.findall(rb"HTTP/1\.[01] (\d{3})", answer)
    return ", ".join(f"status {status.decode()}" for status in statuses) or "no answer"


REFUSED_APP = r"^exit 1: .*runs the app of its own checkout only \(digest \w{12}\).*digest \w{12}\)"
ATTACKS = (
    Attack(
        "flwr run of a foreign app, from outside", "^exit 1: .*400 Bad Request", run_foreign_app
    ),
    Attack("flwr supernode register, from outside", "^exit 1: .*400 Bad Request", register),
    Attack("flwr supernode unregister, from outside", "^exit 1: .*400 Bad Request", unregister),
    Attack("acquire-task, from outside", NO_CERTIFICATE, acquire_task),
    Attack("/openapi.json, from outside", NO_CERTIFICATE, list_of_paths),
    Attack(
        "Control at the machine's other address", "^no connection|^skipped", control_from_outside
    ),
    Attack("a node's key without certificate", NO_CERTIFICATE, no_certificate),
    Attack("an expired certificate", NO_CERTIFICATE, expired),
    Attack("a certificate of another authority", NO_CERTIFICATE, other_authority),
    Attack("the server's certificate as a client's", NO_CERTIFICATE, server_certificate),
    Attack("plain HTTP", "^status 400$", plain_http),
    Attack("a node key copied to another site", "^status 403$", key_of_another),
    Attack("another node's messages with one's own key", "^status 401$", id_of_another),
    Attack(
        "replayed headers of a node",
        "^old: status 401, at another node: status 403, at a stranger: (status 400|no connection)",
        replayed,
    ),
    Attack("two keys in one request", "^status 403$", two_keys),
    Attack("a request hidden in another", "^status 400$", smuggled),
    Attack("another key registered by a known node", "^status 404$", register_as_insider),
    Attack("path tricks by a known node", r"^\d+ times status 404$", path_tricks),
    Attack("a body above the limit", "^(status 413|no connection.*), status 413$", oversized),
    Attack("a flood of requests by a known node", r"\d+ times status 503", flood),
    Attack(
        "a foreign app from the server's own machine",
        REFUSED_APP + r"(?!.*IT RAN).*; then supernode list: exit 0",
        run_foreign_app_inside,
    ),
    Attack("a changed bundle of the same name and version", REFUSED_APP, run_changed_app_inside),
    Attack(
        "a node that was thrown out",
        r"^status 403 \(before: status 405\); known: node1, node2(, node4)?$",
        removed_node,
    ),
)
