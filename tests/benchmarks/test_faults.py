"""Real runs with real faults, by benchmarks/faults.py; its other parts take too long here."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def test_every_fault_of_a_client_is_met_as_expected():
    command = [sys.executable, "-m", "benchmarks.robustness.faults", "--parts", "clients"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("ok  ") == 14
