"""Processes of a federation on loopback, for the tests that start some."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks.performance.simulation import descendants
from fedssl.deployment.checks import free_port

BIN = Path(sys.executable).parent
TINY = ["train.local_epochs=1", "train.max_steps=2", "monitor.bank=100", "monitor.queries=50"]
TINY += ["precision=float32", "num_cpus=1", "model.stem=imagenet"]
PATIENCE = 4  # a shared machine can be that much slower than the times in the tests say


class Place:
    """Processes of one federation, with a home, an output folder and logs of their own."""

    def __init__(self, folder):
        self.folder, self.port, self.started = folder, free_port(), {}
        self.outputs, self.home = folder / "outputs", folder / "home"
        self.home.mkdir()
        self.env = os.environ | {
            "HOME": str(self.home),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONUNBUFFERED": "1",
            "RAY_ADDRESS": "local",  # `flwr run` would join the cluster of another test
        }
        self.env.pop("FLWR_HOME", None)
        self.link = f"127.0.0.1:{self.port}"

    def start(self, name, *command):
        """Start a process whose output goes to NAME.log, in a group of its own."""
        with (self.folder / f"{name}.log").open("a") as log:
            self.started[name] = subprocess.Popen(
                command, cwd=ROOT, env=self.env, stdout=log, stderr=log, start_new_session=True
            )
        return self.started[name]

    def superlink(self, *arguments):
        given = arguments or ("--insecure",)
        self.start("superlink", "flower-superlink", *given, "--port", str(self.port))
        self.wait_for("superlink", "Uvicorn running", 120)

    def client(self, number, *arguments):
        to = ("--superlink", self.link, "--insecure", "--max-wait-time", "5")
        self.start(f"client{number}", "flower-client-app", f"app:client{number}", *to, *arguments)

    def server(self, *overrides, name="server"):
        to = ("--superlink", self.link, "--insecure", "--max-wait-time", "5")
        places = (f"output_dir={self.outputs}", f"cache_dir={self.folder}/cache")
        given = ("app:server", *to, *places, *TINY, *overrides)
        return self.start(name, "flower-server-app", *given)

    def log(self, name):
        return (self.folder / f"{name}.log").read_text()

    def all_logs(self):
        ends = (f"== {file}\n{file.read_text()[-1500:]}" for file in self.folder.glob("*.log"))
        return "\n".join(ends)

    def wait_for(self, name, text, timeout_s):
        """Wait until a log holds a text."""
        deadline = time.monotonic() + timeout_s * PATIENCE
        while text not in self.log(name):
            gone = self.started[name].poll() is not None and text not in self.log(name)
            assert not gone, f"{name} ended without {text!r}\n{self.all_logs()}"
            assert time.monotonic() < deadline, f"no {text!r} in {name}\n{self.all_logs()}"
            time.sleep(0.2)

    def end(self, name, timeout_s):
        """Wait for the end of a process; give its status."""
        try:
            return self.started[name].wait(timeout_s * PATIENCE)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{name} still runs after {timeout_s * PATIENCE} s\n{self.all_logs()}")

    def run(self, *command):
        """Run a command to its end."""
        done = subprocess.run(command, cwd=ROOT, env=self.env, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    def rounds(self):
        """Read the metrics of the newest run."""
        return [json.loads(line) for line in (self.outputs / "latest/metrics.jsonl").open()]

    def kill(self, name):
        """Kill a process and its children without a chance to say goodbye."""
        launcher = self.started[name]
        for pid in [*descendants(launcher.pid), launcher.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        launcher.wait()

    def stop_all(self):
        for process in reversed(self.started.values()):
            if process.poll() is None:
                process.terminate()
        for process in self.started.values():
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        # A ServerApp without its SuperLink ends after Flower's back-off: each of its three
        # threads waits up to 20 s, one after the other, and then 5 s for a graceful end.
        deadline = time.monotonic() + 75
        while left := self.left_over():
            if time.monotonic() > deadline:
                pytest.fail(f"still running: {left}")
            time.sleep(0.5)

    def left_over(self):
        """List Flower processes that carry this place's home."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                ours = f"HOME={self.home}".encode() in (entry / "environ").read_bytes()
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if ours and ("flower" in command or "flwr" in command):
                found.append(command[:200])
        return found
