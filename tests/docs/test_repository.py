"""Rules of the repository: who imports whom, what stands at the root, exact versions."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    return listed.stdout.splitlines()


def test_imports_run_one_way():
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_one_module_calls_the_simulation():
    files = [ROOT / path for path in tracked() if path.endswith(".py")]
    shipped = [file for file in files if not file.is_relative_to(ROOT / "tests")]
    callers = [file for file in shipped if "flwr.simulation" in file.read_text()]
    assert [str(file.relative_to(ROOT)) for file in callers] == ["fedssl/federation/simulation.py"]


def test_the_tree_in_the_readme_is_the_repository():
    tree = re.search(r"```text\n(.*?)```", README.partition("## What is here")[2], re.DOTALL)[1]
    lines = [line for line in tree.splitlines() if line.startswith(("├", "└"))]
    shown = {line.split()[1].rstrip("/") for line in lines}
    there = {Path(path).parts for path in tracked()}
    names = {parts[0] for parts in there}
    telling = {parts[0] for parts in there if len(parts) > 1 or parts[0].endswith(".py")}
    assert {name for name in telling if not name.startswith(".")} <= shown <= names


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("requirements.txt", "-e ."),  # its commands
        ("requirements-dev.txt", "-r requirements.txt"),
    ],
)
def test_requirements_are_exact(name, other):
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    lines = [line for line in lines if line]
    assert other in lines
    for line in lines:
        assert line == other or re.fullmatch(r"[\w.-]+(\[[\w,]+\])?==[\w.]+", line), line
