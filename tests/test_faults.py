"""Real runs with real faults, by benchmarks/faults.py; its other parts take too long here."""

import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.parametrize("part", ["clients", "full disk"])
def test_every_fault_is_met_as_expected(part):
    command = [sys.executable, str(ROOT / "benchmarks" / "faults.py"), "--parts", part]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "ok  " in done.stdout
    if "not tried" in done.stdout:
        pytest.skip("this machine has no mount namespaces for a small disk")
