"""docs/own-images.md, line by line in small."""

import importlib.util
import os
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from docs.pages import blocks, commands
from PIL import Image
from runs.test_encoder_file import PAGE, run_snippet

pytestmark = pytest.mark.slow
COMMANDS = [words[1:] for words in commands("docs/own-images.md") if words[0] == "python"]
SMALL = {
    "main.py": ["num_rounds=1", "train.max_steps=1", "model.stem=imagenet", "figures.map_images=5"],
    "test.py": ["epochs=2", "seeds=1"],
    "scripts.embed": ["precision=float32"],
    "scripts.export": [],
}
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}  # the page starts in the project's directory


def run(place, words, *more):
    """Run a command of Python as the page has it, in another directory."""
    start = ["-m", words[1]] if words[0] == "-m" else [ROOT / words[0]]
    rest = words[2:] if words[0] == "-m" else words[1:]
    command = [sys.executable, *start, *rest, *more]
    return subprocess.run(command, cwd=place, env=ENVIRONMENT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory, digits):
    """A folder with `photos/`, `labelled/` and an image, and nothing else."""
    folder = tmp_path_factory.mktemp("walkthrough")
    for row, label in enumerate(digits.train.labels[:90]):
        below = f"labelled/digit {label}" if row < 50 else "photos"
        (folder / below).mkdir(parents=True, exist_ok=True)
        pixels = np.array(digits.train.pixels[row]).transpose(1, 2, 0)
        Image.fromarray(pixels).resize((64, 64)).save(folder / below / f"{row}.png")
    shutil.copy(folder / "photos" / "60.png", folder / "photo.png")
    (folder / "photos" / "broken.png").touch()
    return folder


def test_every_line_of_the_walkthrough_works(place, cache_dir):
    programs = [words[1] if words[0] == "-m" else words[0] for words in COMMANDS]
    assert programs == ["main.py", "scripts.embed", "test.py", "scripts.embed", "scripts.export"]
    for program, words in zip(programs, COMMANDS, strict=True):
        if program == "scripts.export" and importlib.util.find_spec("onnxruntime") is None:
            continue
        cache = [f"cache_dir={cache_dir}"] if program in ("main.py", "test.py") else []
        done = run(place, words, *SMALL[program], *cache)
        assert (done.returncode, done.stderr) == (0, ""), (words, done.stdout, done.stderr)
        if program == "main.py":
            assert "1 unreadable files left out: " in done.stdout
            assert "No labels" in done.stdout
            assert not (place / "outputs" / "latest" / "results.json").exists()
            refuses_unlabelled(place, cache)
        if program == "test.py":
            assert "100 % of the labels (40)" in done.stdout
    read_the_features(place)


def refuses_unlabelled(place, cache):
    """Evaluate the run on its own images, which have no labels."""
    refused = run(place, ["test.py"], *cache)
    assert refused.returncode == 2
    assert "no labels" in refused.stderr


def read_the_features(place):
    """Run the page's lines of Python: the table, and the encoder without this project."""
    table = pq.read_table(place / "features.parquet")
    (lines,) = (code for code in blocks(PAGE, "python") if code.startswith("import numpy"))
    checked = f"{lines}\nassert features.shape == (40, 512), features.shape"
    subprocess.run([sys.executable, "-c", checked], cwd=place, check=True)
    row = table["path"].to_pylist().index("60.png")
    ours = np.array(table["features"][row].as_py(), dtype=np.float32)
    np.testing.assert_allclose(run_snippet(place), ours, rtol=1e-4, atol=1e-5)
    assert (place / "neighbours.png").stat().st_size > 10_000
