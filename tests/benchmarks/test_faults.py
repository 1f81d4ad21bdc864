"""Real runs with real faults; the other parts of the benchmark take too long here."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

# What needs real processes, and an update that is refused; test_hostile.py has more of these.
FAULTS = (
    "raises an exception",
    "its process is killed",
    "takes longer than round_timeout_s",
    "weights with NaN",
)


def test_faults_of_a_client_are_met_as_expected():
    command = [sys.executable, "-m", "benchmarks.robustness.faults", "--parts", "clients"]
    done = subprocess.run([*command, "--faults", *FAULTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("ok  ") == len(FAULTS) + 1
