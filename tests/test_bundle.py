"""The app's bundle, which travels to every SuperNode: small, and all that `app` imports."""

import ast
import subprocess
from io import BytesIO
from zipfile import ZipFile

import grimp
import pytest
from conftest import ROOT
from flwr.cli.build import build_fab_from_files

ROOT_FILES = ("app", "client", "utils", "model")


@pytest.fixture(scope="module")
def bundle():
    """Build the bundle of the files that git knows; return its size and those of its files."""
    command = ["git", "ls-files"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    data, _ = build_fab_from_files({name: ROOT / name for name in listed.stdout.splitlines()})
    with ZipFile(BytesIO(data)) as archive:
        files = {entry.filename: entry.file_size for entry in archive.infolist()}
    del files[".info/CONTENT"]  # Flower's list of the others
    return len(data), files


def loaded_modules(name):
    """List what a root file imports at its top and in the functions that a run calls."""
    called = ("main", "run_rounds", "build_federation", "open_run")
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    places = [node for node in tree.body if getattr(node, "name", "") in called]
    nodes = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    nodes += [n for place in places for n in ast.walk(place) if isinstance(n, ast.ImportFrom)]
    return {node.module for node in nodes} | {
        f"{node.module}.{alias.name}" for node in nodes for alias in node.names
    }


def test_the_bundle_is_small(bundle):
    size, files = bundle
    assert len(files) <= 155
    assert max(files.values()) <= 1_000_000
    assert size <= 680_000


def test_the_bundle_holds_all_that_the_app_imports(bundle):
    _, files = bundle
    graph = grimp.build_graph("fedssl", cache_dir=None)
    needed = {"fedssl"}
    for name in ROOT_FILES:
        for module in loaded_modules(name) & graph.modules:
            needed |= {module} | graph.find_upstream_modules(module)
    paths = [ROOT / module.replace(".", "/") for module in needed]
    sources = [p / "__init__.py" if p.is_dir() else p.with_suffix(".py") for p in paths]
    missing = {str(source.relative_to(ROOT)) for source in sources} - files.keys()
    assert not missing
    assert {f"{name}.py" for name in ROOT_FILES} <= files.keys()


def test_the_bundle_holds_every_class_that_the_configuration_names(bundle):
    _, files = bundle
    named = [
        line.partition("_target_: ")[2].split()[0]
        for file in (ROOT / "conf").glob("**/*.yaml")
        for line in file.read_text().splitlines()
        if line.strip().startswith("_target_: ") and str(file.relative_to(ROOT)) in files
        if file.parent.name != "eval"  # the app evaluates nothing
    ]
    own = [name for name in named if name.partition(".")[0] in ("fedssl", *ROOT_FILES)]
    assert {f"{name.rpartition('.')[0].replace('.', '/')}.py" for name in own} <= files.keys()
