"""A SuperLink as the two commands see it: whether it answers, and a process that needs it."""

import http.client
import json
import os
import signal
import ssl
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

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
            raise RuntimeError(unreachable(link, error)) from error
        except OSError as error:
            if time.monotonic() >= deadline:
                raise RuntimeError(unreachable(link, error)) from error
        if not told:
            print(
                f"Waiting up to {max_wait_s:g} s for a SuperLink at {link.address} ...", flush=True
            )
            told = True
        time.sleep(min(PROBE_EVERY_S, max(0.1, deadline - time.monotonic())))


def unreachable(link: Link, error: Exception) -> str:
    """Say in one line why a SuperLink is out of reach."""
    if isinstance(error, Refused):
        return f"the SuperLink at {link.address} refuses: {error}"
    reason = getattr(error, "strerror", None) or str(error)
    return (
        f"no SuperLink at {link.address} ({reason}); start one with flower-superlink, or give "
        "its address with --superlink HOST:PORT"
    )
