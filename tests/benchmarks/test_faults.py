"""Real runs with real faults; the other parts of the benchmark take too long here."""

import subprocess
import sys

import pytest

from benchmarks.robustness.client_faults import CLIENT_FAULTS

pytestmark = pytest.mark.slow


def test_every_fault_of_a_client_is_met_as_expected():
    command = [sys.executable, "-m", "benchmarks.robustness.faults", "--parts", "clients"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("ok  ") == len(CLIENT_FAULTS) + 1
