"""The processes of a simulation: closed to strangers, and gone when it is told to end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest
from conftest import ROOT

from benchmarks.robustness import kills
from fedssl.federation import simulation
from fedssl.federation.resources import ClientResources

PATIENCE = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
STRANGER = """
import sys, ray
ray.init(sys.argv[1], logging_level=50)
print("ran", ray.get(ray.remote(lambda: 6 * 7).remote(), timeout=30))
"""


def clean(**variables):
    """Give the environment of somebody who has not started the simulation."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return kept | variables


def begin(tmp_path, cache_dir, mark, *arguments):
    """Start main.py, and wait for the end of its first round."""
    places = [f"output_dir={tmp_path}", f"cache_dir={cache_dir}"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "main.py", *kills.RUN, *arguments, *places],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=clean(KILLS_MARK=mark),
        start_new_session=True,
    )
    metrics = tmp_path / "latest" / "metrics.jsonl"
    while not metrics.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    return process


def commands_of(mark):
    """Give the command lines of a run's processes, which all users of the machine see."""
    for pid in kills.descendants(mark):
        with suppress(OSError):
            yield Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def listening(port):
    """Give the addresses on which somebody listens to a port, in the kernel's notation."""
    tables = [Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6")]
    fields = [line.split() for table in tables for line in table.splitlines()]
    ends = [field[1].split(":") for field in fields if field[3] == "0A"]
    return {address for address, number in ends if int(number, 16) == port}


def test_where_ray_does_not_start_a_line_says_so(monkeypatch):
    import ray

    def time_out(*args, **kwargs):
        raise Exception("The current node timed out during startup.\nThis could happen because")

    monkeypatch.setattr(ray, "init", time_out)
    with pytest.raises(RuntimeError, match=r"^Ray did not start \(The current node timed out .*\)"):
        simulation._start_ray(ClientResources(1, 0, 0, 1))


@pytest.mark.slow
def test_a_stranger_who_knows_the_port_runs_nothing(tmp_path, cache_dir):
    mark = f"stranger-{os.getpid()}"
    process = begin(tmp_path, cache_dir, mark, "num_rounds=500")
    try:
        seen = list(commands_of(mark))
        address = next(filter(None, (re.search(r"--gcs-address=(\S+)", line) for line in seen)))[1]
        host, _, port = address.partition(":")
        assert host == "127.0.0.1"
        assert listening(int(port)) == {"0000000000000000FFFF00000100007F"}  # not on all: 00...0
        assert not any("RAY_AUTH_TOKEN" in line or "auth-token" in line for line in seen)
        for given in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}):
            command = [sys.executable, "-c", STRANGER, address]
            env = clean(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", **PATIENCE, **given)
            done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
            assert done.returncode != 0, done.stdout
            assert "ran" not in done.stdout
            assert re.search("(?i)auth|token", done.stderr), done.stderr
        rounds = len((tmp_path / "latest" / "metrics.jsonl").read_text().splitlines())
        deadline = time.monotonic() + 60
        while len((tmp_path / "latest" / "metrics.jsonl").read_text().splitlines()) <= rounds:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        process.terminate()
        text, _ = process.communicate(timeout=60)
        left = kills.await_end(mark)
    assert (process.returncode, left) == (143, 0), text


@pytest.mark.slow
@pytest.mark.parametrize("deaf", [False, True], ids=["plain", "started with SIGINT ignored"])
def test_sigterm_ends_a_run_as_ctrl_c_does(tmp_path, cache_dir, deaf):
    mark = f"sigterm-{os.getpid()}-{deaf}"
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN if deaf else signal.SIG_DFL)
    try:
        process = begin(tmp_path, cache_dir, mark, "num_rounds=500")
    finally:
        signal.signal(signal.SIGINT, earlier)
    began = time.monotonic()
    process.terminate()
    text, _ = process.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert process.returncode == 143, text
    run = (tmp_path / "latest").resolve()
    last = text.splitlines()[-1]
    assert last == f"terminated: go on with: python main.py resume={run}"
    assert "Traceback" not in text
    assert kills.await_end(mark) == 0
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["round"] == len(lines)


class SlowGrid:
    """Two nodes, of which one answers at the third look and the other never."""

    looks = 0

    def push_messages(self, messages):
        self.asked = [(m.metadata.dst_node_id, m.metadata.message_type) for m in messages]
        return ["first", "second"]

    def pull_messages(self, message_ids):
        self.looks += 1
        metadata = SimpleNamespace(reply_to_message_id="first")
        return [SimpleNamespace(metadata=metadata)] if self.looks == 3 else []


def test_every_process_begins_before_the_first_round_unless_all_are_gone():
    grid, looks = SlowGrid(), []

    class Gone(Event):
        def wait(self, timeout=None):
            looks.append(timeout)
            return len(looks) > 5  # the clients are gone

    simulation._start_clients(grid, [7, 9], Gone())
    assert grid.asked == [(7, "query"), (9, "query")]
    assert grid.looks == 5
