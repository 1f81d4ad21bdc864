"""A child process of a command: its output passed on, and its end."""

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Thread

from fedssl.deployment.superlink import Watch

GRACE_S = 10.0  # for a process to end by itself after SIGTERM
LOOK_EVERY_S = 0.1


class ChildProcess:
    """A child process in a group of its own, whose output is passed on line by line."""

    def __init__(
        self,
        command: Sequence[str],
        env: dict[str, str],
        on_line: Callable[[str], None] | None = None,
    ) -> None:
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
        self._on_line = on_line
        self._pump = Thread(target=self._pass_on, daemon=True)
        self._pump.start()

    def _pass_on(self) -> None:
        for line in self.process.stdout or ():
            self.last_lines.append(line.rstrip())
            if self._on_line:
                self._on_line(line)
            print(line, end="", flush=True)

    def wait(self, watch: Watch, on_answer: Callable[[], None] | None = None) -> int:
        """Wait until the process ends, or the SuperLink has been gone for too long.

        Args:
            on_answer: called whenever the SuperLink has answered.

        Returns:
            Its exit status.

        Raises:
            RuntimeError: the SuperLink has been gone for too long.
        """
        while self.process.poll() is None:
            time.sleep(LOOK_EVERY_S)
            if watch.look() and on_answer:
                on_answer()
        self._pump.join(timeout=LOOK_EVERY_S)  # its own children may hold the pipe still
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
        self._pump.join(timeout=GRACE_S)
