"""Who imports whom among the files at the root, which import-linter can't take for packages."""

import subprocess
import sys

import pytest
from conftest import ROOT, imported_modules

# A file imports from those before it.
ORDER = ("model", "utils", "client", "main", "test", "app")
ENDS = ("main", "test", "app")  # which nobody imports
# What a SuperNode, which imports client.py for every message, has no use for.
UNUSED = ("fedssl.reporting", "fedssl.evaluation", "scripts", "benchmarks", "matplotlib", "sklearn")


def loaded_by(statement):
    """Name all modules that a fresh process holds after a statement."""
    program = f"import sys\n{statement}\nprint(*sys.modules)"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_all_files_at_the_root_have_their_place():
    assert {file.stem for file in ROOT.glob("*.py")} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_file_at_the_root_imports_from_those_before_it(name):
    before = set(ORDER[: ORDER.index(name)]) - set(ENDS)
    assert imported_modules(name) & {*ORDER, "benchmarks"} <= before


def test_a_client_loads_only_what_it_needs():
    loaded = loaded_by("import client")
    assert [m for m in loaded if m.startswith(tuple(UNUSED))] == []


@pytest.mark.parametrize(
    "module",
    ["fedssl", "fedssl.config.help", "fedssl.config.compose", "fedssl.deployment.commands"],
)
def test_the_commands_and_the_help_start_without_torch(module):
    assert {"torch", "ray", "matplotlib"}.isdisjoint(loaded_by(f"import {module}"))
