"""The repository against its README and its own rules."""

import ast
import re
import shlex
import subprocess

import pytest
from conftest import ROOT

from config import flags_to_overrides, load_config

# Who may import whom: a module imports only from lower levels, never its own.
LEVELS = [
    {"environment", "errors"},
    {"augment", "config", "model", "rundir", "sources", "display"},
    {"utils"},
    {"client", "figures", "server", "test"},
    {"app", "main"},
]
README = (ROOT / "README.md").read_text()


def tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    return listed.stdout.splitlines()


def own_imports(file):
    names = {path.stem for path in ROOT.glob("*.py")}
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found & names


def test_imports_run_one_way():
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    for file in ROOT.glob("*.py"):
        for name in own_imports(file):
            assert level[name] < level[file.stem], f"{file.stem} imports {name}"


def test_only_main_calls_the_simulation():
    callers = [f.stem for f in ROOT.glob("*.py") if "flwr.simulation" in f.read_text()]
    assert callers == ["main"]


def test_the_tree_in_the_readme_is_the_repository():
    tree = re.search(r"```text\n(.*?)```", README, re.DOTALL)[1]
    shown = {line.split()[1].rstrip("/") for line in tree.splitlines() if line.startswith("├")}
    shown |= {line.split()[1].rstrip("/") for line in tree.splitlines() if line.startswith("└")}
    there = {path.split("/")[0] for path in tracked()}
    hidden = {".gitignore"}
    assert set(shown) == there - hidden


def commands():
    """List every command of the README's shell blocks, continuation lines joined."""
    for block in re.findall(r"```(?:bash|shell)\n(.*?)```", README, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


@pytest.mark.parametrize("words", [w for w in commands() if w[0] == "python"], ids=" ".join)
def test_the_readmes_commands_are_valid(words):
    script, arguments = words[1], words[2:]
    assert (ROOT / script).is_file()
    if script in ("main.py", "test.py"):
        overrides = [a for a in flags_to_overrides(arguments) if not a.startswith("-")]
        overrides = [re.sub(r"=([^\[,]*),.*", r"=\1", override) for override in overrides]
        load_config("config" if script == "main.py" else "test", overrides)


def test_the_readme_has_one_line_for_each_set_up():
    lines = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(lines) == 2
    assert lines[0].endswith("python main.py")
    assert lines[1].endswith("python -m pytest")


def test_the_readmes_files_and_links_exist():
    for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", README):
        path = next(filter(None, target))
        if not path.startswith("http"):
            assert (ROOT / path).exists(), path


def test_requirements_are_exact():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    for line in filter(None, (line.partition("#")[0].strip() for line in lines)):
        assert re.fullmatch(r"[\w.-]+(\[\w+\])?==[\w.]+", line), line
