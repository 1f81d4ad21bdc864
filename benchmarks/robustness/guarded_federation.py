"""A SuperLink and its door as processes on this machine, and callers that speak to them.

Used by the tests of the door and by `benchmarks.robustness.attacks`.
"""

import base64
import http.client
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER

from fedssl.deployment.certificates import make_certificates
from fedssl.deployment.checks import free_port
from fedssl.deployment.commands import environment
from fedssl.deployment.door import write_door
from fedssl.env import ROOT

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
START_S = 120.0
PEM = serialization.Encoding.PEM


class Federation:
    """Processes with a home, logs and certificates of their own in one folder."""

    def __init__(self, folder: Path, nodes: Sequence[str] = ("node1", "node2", "node3")) -> None:
        self.folder, self.started = folder, {}
        self.home, self.certificates = folder / "home", folder / "certificates"
        (self.home / ".flwr").mkdir(parents=True)
        self.port, self.door_port = free_port(), free_port()
        make_certificates(self.certificates, [outside_address()], nodes, days=2)
        self.write_door()
        self.ca = self.certificates / "ca.crt"
        connections = {"inside": f"127.0.0.1:{self.port}", "door": f"127.0.0.1:{self.door_port}"}
        (self.home / ".flwr" / "config.toml").write_text(
            "".join(
                f'[superlink.{name}]\naddress = "{address}"\nroot-certificates = "{self.ca}"\n'
                for name, address in connections.items()
            )
        )
        self.env = environment(HOME=str(self.home))
        self.env.pop("FLWR_HOME", None)
        self.env["PYTHONPATH"] = str(ROOT)

    def write_door(self) -> None:
        """Write nginx.conf for the nodes of now."""
        write_door(self.certificates, port=self.door_port, superlink_port=self.port)

    def start(self, name: str, *command: str, cwd: Path = ROOT) -> subprocess.Popen:
        """Start a process whose output goes to NAME.log, in a group of its own."""
        with (self.folder / f"{name}.log").open("a") as log:
            self.started[name] = subprocess.Popen(
                command, cwd=cwd, env=self.env, stdout=log, stderr=log, start_new_session=True
            )
        return self.started[name]

    def start_superlink(self, *arguments: str) -> None:
        """Start the guarded SuperLink and wait until it answers."""
        given = ("--certificates", str(self.certificates), "--port", str(self.port))
        command = (sys.executable, "-m", "scripts.superlink", *given, *arguments)
        self.start("superlink", *command)
        self.wait_for_port("superlink", self.port)

    def start_door(self) -> None:
        """Start nginx as the guide does, and wait until it listens."""
        given = ("-p", str(self.certificates), "-c", "nginx.conf", "-g", "daemon off;")
        self.start("door", str(NGINX), *given)
        self.wait_for_port("door", self.door_port)

    def reload_door(self) -> None:
        """Have nginx read its file anew, and wait until its old workers are gone."""
        pid = self.started["door"].pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        old = set(children.read_text().split())
        given = ["-p", str(self.certificates), "-c", "nginx.conf", "-s", "reload"]
        subprocess.run([str(NGINX), *given], check=True, capture_output=True)
        deadline = time.monotonic() + 30
        while old & set(children.read_text().split()):
            if time.monotonic() > deadline:
                raise RuntimeError(f"nginx keeps its old workers:\n{self.log('door')}")
            time.sleep(0.1)

    def hang_up_superlink(self) -> None:
        """Have the SuperLink read nodes.yaml anew, and wait until it has."""
        before = self.log("superlink").count("\n")
        os.kill(self.started["superlink"].pid, signal.SIGHUP)
        deadline = time.monotonic() + 10
        while "nodes.yaml is read" not in "\n".join(self.log("superlink").split("\n")[before:]):
            if time.monotonic() > deadline:
                raise RuntimeError("the SuperLink does not read nodes.yaml")
            time.sleep(0.1)

    def wait_for_port(self, name: str, port: int) -> None:
        """Wait until a process listens.

        Raises:
            RuntimeError: it ended, or takes too long.
        """
        deadline = time.monotonic() + START_S
        while True:
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return
            if self.started[name].poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} does not listen:\n{self.log(name)[-2000:]}")
            time.sleep(0.2)

    def log(self, name: str) -> str:
        """Read what a process said."""
        return (self.folder / f"{name}.log").read_text()

    def run(self, *command: str, cwd: Path = ROOT, timeout_s: float = 120) -> tuple[int, str]:
        """Run a command to its end; give its status and output."""
        done = subprocess.run(
            command, cwd=cwd, env=self.env, capture_output=True, text=True, timeout=timeout_s
        )
        return done.returncode, done.stdout + done.stderr

    def stop(self, name: str, timeout_s: float = 120) -> int:
        """End a process by SIGTERM, and by SIGKILL if it doesn't follow; give its status."""
        process = self.started[name]
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        return process.wait()

    def stop_all(self) -> None:
        """End all processes, the latest first."""
        for name in reversed(list(self.started)):
            self.stop(name)


@dataclass
class Caller:
    """Somebody who speaks to the door, or to another port.

    Attributes:
        certificate: of its TLS client, with the key (PEM); None shows none.
        key: the key of a node that signs its requests (OpenSSH); None signs none.
    """

    federation: Federation
    certificate: Path | None = None
    key: Path | None = None
    port: int | None = None
    host: str = "127.0.0.1"
    extra: dict[str, str] = field(default_factory=dict)

    def connect(self) -> http.client.HTTPSConnection:
        """Make a connection that isn't open yet."""
        context = ssl.create_default_context(cafile=self.federation.ca)
        if self.certificate:
            context.load_cert_chain(self.certificate)
        port = self.port or self.federation.door_port
        return http.client.HTTPSConnection(self.host, port, context=context, timeout=60)

    def ask(self, path: str, body: bytes = b"", method: str = "POST") -> int:
        """Send a request as it stands; give the answer's status."""
        return self.exchange(path, body, method)[0]

    def exchange(self, path: str, body: bytes = b"", method: str = "POST") -> tuple[int, bytes]:
        """Send a request as it stands; give the answer's status and body."""
        connection = self.connect()
        try:
            connection.request(method, path, body, self.headers())
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def headers(self) -> dict[str, str]:
        """Give the headers of Flower's protobuf requests, signed if there is a key."""
        signed = sign(self.key) if self.key else {}
        return {"Content-Type": "application/protobuf"} | signed | self.extra


def sign(key_file: Path, at: datetime | None = None) -> dict[str, str]:
    """Make the headers by which a node shows its key, as Flower's SuperNode does."""
    key = load_ssh_private_key(key_file.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    timestamp = (at or datetime.now(UTC)).isoformat()
    signature = key.sign(timestamp.encode(), ec.ECDSA(hashes.SHA256()))
    public = key.public_key().public_bytes(PEM, form)
    return {
        FLEET_HTTP_PUBLIC_KEY_HEADER: base64.b64encode(public).decode(),
        TIMESTAMP_HEADER: timestamp,
        FLEET_HTTP_SIGNATURE_HEADER: base64.b64encode(signature).decode(),
    }


def expired_certificate(federation: Federation, name: str) -> Path:
    """Let the federation's own authority sign a client certificate that ended yesterday."""
    ca = x509.load_pem_x509_certificate(federation.ca.read_bytes())
    ca_key_file = federation.certificates / "ca.key"
    ca_key = serialization.load_pem_private_key(ca_key_file.read_bytes(), None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    key, now = ec.generate_private_key(ec.SECP384R1()), datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=3))
        .not_valid_after(now - timedelta(days=1))
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    form = serialization.PrivateFormat.PKCS8
    private = key.private_bytes(PEM, form, serialization.NoEncryption())
    file = federation.folder / f"expired-{name}.pem"
    file.write_bytes(certificate.public_bytes(PEM) + private)
    return file


def outside_address() -> str:
    """Find this machine's address towards others; loopback if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))  # sends nothing
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])
