"""A node of a federation: a SuperNode that is started again when its SuperLink lost it."""

import hashlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from flwr.supercore.utils import get_flwr_home

from fedssl.deployment.process import ChildProcess
from fedssl.deployment.superlink import SuperLinkAddress, Watch, await_superlink

SUPERNODE = [sys.executable, "-m", "fedssl.deployment.supernode"]
POLLING = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1"}  # s; Flower's superexec takes 1
CONNECTED = "SuperNode ID:"  # what Flower logs once it is
STABLE_S = 10.0  # a connection that lasted so long was none of the failed ones
RETRY_EVERY_S = 2.0
ONLINE_S = 90.0  # so long, and not longer, may a SuperLink take a dead node for connected

# What Flower's numbers of Fleet API errors mean to somebody who starts a node.
ACTIVATION_FAILED = "[code: 2004]"
REFUSALS = {
    "[code: 2001]": "it only takes nodes whose keys it knows; give one with "
    "--auth-supernode-private-key",
    ACTIVATION_FAILED: "it does not know this node's key; register its public half with "
    "`flwr supernode register`, or stop the other node that uses it",
}


class Presence:
    """A file that says when a node with this key last was connected, and did not say goodbye.

    Flower gives one error for a key that it doesn't know and for one whose node is
    connected, be it the dead one of a minute ago.
    """

    def __init__(self, key: Path | None) -> None:
        name = hashlib.sha256(str(key).encode()).hexdigest()[:16]
        self._file = get_flwr_home() / "connected" / name if key else None

    def note(self) -> None:
        """Note that the node is connected now."""
        if self._file:
            self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._file.touch()

    def clear(self) -> None:
        """Note that it said goodbye."""
        if self._file:
            self._file.unlink(missing_ok=True)

    def is_recent(self) -> bool:
        """Tell whether a SuperLink may still take it for connected."""
        if not self._file or not self._file.exists():
            return False
        return time.time() - self._file.stat().st_mtime < ONLINE_S


class Node:
    """A SuperNode, and its successors."""

    def __init__(
        self,
        arguments: Sequence[str],
        env: dict[str, str],
        link: SuperLinkAddress,
        max_wait_s: float,
        key: Path | None = None,
    ) -> None:
        self._command = [*SUPERNODE, "--parent-pid", str(os.getpid()), *arguments]
        self._env, self._link, self._max_wait_s = env, link, max_wait_s
        self._presence = Presence(key)
        self._known = self._presence.is_recent()  # this SuperLink has taken the node before
        self._connected_at: float | None = None

    def run(self) -> None:
        """Keep a SuperNode connected until an interrupt.

        Raises:
            RuntimeError: the SuperLink refuses the node, or is gone for too long.
        """
        lost_at: float | None = None
        await_superlink(self._link, self._max_wait_s)
        while True:
            reason = self._run_once()
            now = time.monotonic()
            if self._connected_at is not None:
                self._known = True
                if now - self._connected_at > STABLE_S:
                    lost_at = None
            elif not self._known:
                raise RuntimeError(reason)
            lost_at = lost_at or now
            if now - lost_at >= self._max_wait_s:
                raise RuntimeError(f"{reason} (tried again for {self._max_wait_s:g} s)")
            print("This node has lost its SuperLink; it connects again.", flush=True)
            time.sleep(RETRY_EVERY_S)
            self._await_return(lost_at)

    def _run_once(self) -> str:
        """Run a SuperNode to its end; give the reason of it."""
        self._connected_at = None
        child = ChildProcess(self._command, self._env, self._look_for_connection)
        try:
            child.wait(Watch(self._link, self._max_wait_s), self._note)
        finally:
            child.stop()
            if child.process.returncode == 0:
                self._presence.clear()
        return reason_of(list(child.last_lines))

    def _await_return(self, lost_at: float) -> None:
        watch = Watch(self._link, self._max_wait_s)
        watch.gone_since = lost_at
        while not watch.look():
            time.sleep(0.1)

    def _look_for_connection(self, line: str) -> None:
        if CONNECTED in line:
            self._connected_at = time.monotonic()
            self._presence.note()

    def _note(self) -> None:
        if self._connected_at is not None:
            self._presence.note()


def reason_of(lines: Sequence[str]) -> str:
    """Find the line in Flower's last output that says why it ended."""
    for code, meaning in REFUSALS.items():
        if any(code in line for line in lines):
            return f"the SuperLink refuses this node: {meaning}"
    plain = [line.partition(":      ")[2] or line for line in lines]
    for number, line in enumerate(plain):
        if "Exit Code:" in line:
            following = [text.strip() for text in plain[number + 1 :] if text.strip()]
            return " ".join(text for text in following[:2] if "http" not in text)
    return next((line for line in reversed(plain) if line.strip()), "no output")
