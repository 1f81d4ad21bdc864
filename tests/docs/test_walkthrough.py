"""The README's section "Your own images", line by line in small."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from PIL import Image
from runs.test_encoder_file import README, run_snippet

pytestmark = pytest.mark.slow
SECTION = README.partition("## Your own images")[2].partition("\n## ")[0]
COMMANDS = re.findall(r"^python (\w+\.py .*?)(?: +#.*)?$", SECTION, re.MULTILINE)
SMALL = {
    "main.py": ["num_rounds=1", "train.max_steps=1", "model.stem=imagenet", "figures.map_images=5"],
    "test.py": ["epochs=2", "seeds=1"],
    "embed.py": ["precision=float32"],
    "export.py": [],
}


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
    assert [line.split()[0] for line in COMMANDS] == [
        *("main.py", "embed.py", "test.py", "embed.py", "export.py")
    ]
    for line in COMMANDS:
        script, *arguments = shlex.split(line)
        if script == "export.py" and importlib.util.find_spec("onnxruntime") is None:
            continue
        cache = [f"cache_dir={cache_dir}"] if script in ("main.py", "test.py") else []
        done = subprocess.run(
            [sys.executable, ROOT / script, *arguments, *SMALL[script], *cache],
            cwd=place,
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, ""), (line, done.stdout, done.stderr)
        if script == "main.py":
            assert "1 unreadable files left out: " in done.stdout
            assert "No labels" in done.stdout
            assert not (place / "outputs" / "latest" / "results.json").exists()
            refuses_unlabelled(place, cache)
        if script == "test.py":
            assert "100 % of the labels (40)" in done.stdout
    read_the_features(place)


def refuses_unlabelled(place, cache):
    """Evaluate the run on its own images, which have no labels."""
    command = [sys.executable, ROOT / "test.py", *cache]
    refused = subprocess.run(command, cwd=place, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "no labels" in refused.stderr


def read_the_features(place):
    """Run the section's lines of Python: the table, and the encoder without this project."""
    table = pq.read_table(place / "features.parquet")
    (lines,) = re.findall(r"```python\n(import numpy.*?)```", SECTION, re.DOTALL)
    checked = f"{lines}\nassert features.shape == (40, 512), features.shape"
    subprocess.run([sys.executable, "-c", checked], cwd=place, check=True)
    row = table["path"].to_pylist().index("60.png")
    ours = np.array(table["features"][row].as_py(), dtype=np.float32)
    np.testing.assert_allclose(run_snippet(place), ours, rtol=1e-4, atol=1e-5)
    assert (place / "neighbours.png").stat().st_size > 10_000
