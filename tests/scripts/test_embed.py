"""scripts/embed.py: features of a folder as Parquet, and the picture of neighbours."""

import os
import subprocess
import sys

import matplotlib.image
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from PIL import Image
from runs.test_encoder_file import BACKEND, write_encoder

from fedssl.config.compose import load_config
from fedssl.data.decoding import decode
from fedssl.errors import UserError
from fedssl.evaluation.features import extract_features
from fedssl.runs.encoder_file import ENCODER_FILE, load_encoder
from scripts.embed import embed, name_folder, prepare


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_encoder(folder, "model.stem=imagenet")
    return folder


@pytest.fixture
def photos(tmp_path, digits):
    """Images of several sizes and modes at several depths, and two that are broken."""
    folder = tmp_path / "photos"
    for row, (name, mode, size) in enumerate(
        [
            ("a.png", "RGB", (8, 8)),
            ("deep/er/b.PNG", "RGBA", (20, 12)),
            ("deep/c.png", "L", (8, 30)),
            ("deep/it's d=1 (x).png", "1", (9, 9)),
            ("e.gif.bmp", "P", (16, 16)),
        ]
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.array(digits.train.pixels[row]).transpose(1, 2, 0)
        Image.fromarray(pixels).resize(size).convert(mode).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"no")
    (folder / "notes.txt").write_bytes(b"no image")
    (folder / "deep" / "half.png").write_bytes((folder / "a.png").read_bytes()[:60])
    return folder


def settings_of(run, folder, *overrides):
    named = name_folder([str(folder), f"run={run}", *overrides])
    return load_config("embed", ["precision=float32", *named])


def test_every_readable_image_gets_the_features_of_the_evaluation(run, photos, tmp_path, capsys):
    out = tmp_path / "features.parquet"
    embed(settings_of(run, photos, f"out={out}", "batch_size=2"))
    table = pq.read_table(out)
    paths = table["path"].to_pylist()
    assert paths == ["a.png", "deep/c.png", "deep/er/b.PNG", "deep/it's d=1 (x).png", "e.gif.bmp"]
    assert table.column_names == ["path", "features"]
    assert str(table.schema.field("features").type) == "fixed_size_list<element: float>[512]"
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    trained = load_encoder(run / ENCODER_FILE)
    assert trained.metadata.items() <= metadata.items()
    pixels = np.stack([decode(photos / path, 8) for path in paths])
    expected = extract_features(trained.encoder, pixels, BACKEND, 5, 8)
    np.testing.assert_allclose(
        np.stack(table["features"].to_numpy()), expected, rtol=1e-4, atol=1e-5
    )
    said = capsys.readouterr().out
    assert "2 unreadable files left out" in said
    assert "broken.jpg" in said
    assert "half.png" in said
    assert "5 images, 512 features each" in said


@pytest.mark.parametrize("splits", [[""], ["train", "test"]])
def test_class_folders_become_labels(run, tmp_path, digits, splits):
    for split in splits:
        for row, label in enumerate(["cat", "dog", "cat"]):
            place = tmp_path / "labelled" / split / label / "more"
            place.mkdir(parents=True, exist_ok=True)
            pixels = np.array(digits.train.pixels[row]).transpose(1, 2, 0)
            Image.fromarray(pixels).save(place / f"{row}.png")
    out, picture = tmp_path / "f.parquet", tmp_path / "n.png"
    embed(settings_of(run, tmp_path / "labelled", f"out={out}", f"neighbours={picture}"))
    assert pq.read_table(out)["label"].to_pylist() == ["cat", "cat", "dog"] * len(splits)
    assert matplotlib.image.imread(picture).std() > 0.05
    assert not list(tmp_path.glob(".partial*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no folder given"),
        (["{tmp}/none"], "no such folder"),
        (["{tmp}/a", "{tmp}/b"], "give one folder"),
        (["{tmp}/empty"], "no image found"),
        (["{photos}", "run=/nowhere"], "no encoder.safetensors there"),
        (["{photos}", "encoder={photos}/a.png"], "damaged, or not the encoder of a run"),
        (["{photos}", "out={photos}"], "is a folder"),
        (["{photos}", "out=/nowhere/f.parquet"], "there is no folder /nowhere"),
        (["{photos}", "neighbours=/proc/n.png"], "can't be written"),
        (["{photos}", "batch_size=0"], "at least 1"),
        (["{photos}", "neighbour=n.png"], "did you mean neighbours?"),
    ],
)
def test_bad_input_gets_one_line_before_any_work(run, photos, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    given = [argument.format(photos=photos, tmp=tmp_path) for argument in arguments]
    if not any(a.startswith("run=") for a in given):
        given.append(f"run={run}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message.replace("?", r"\?")) as error:
        prepare(load_config("embed", name_folder(given)))
    assert len(str(error.value).splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_only_unreadable_images_leave_the_old_file(run, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    out = tmp_path / "f.parquet"
    out.write_text("old")
    with pytest.raises(UserError, match="none of the 1 images can be read"):
        embed(settings_of(run, tmp_path / "photos", f"out={out}"))
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.parquet", "photos"]


def test_as_a_program_it_takes_the_folder_in_any_place(run, photos, tmp_path):
    strange = tmp_path / "it's a (strange) name=1"
    photos.rename(strange)
    if os.name != "nt":  # a name that is no text
        (strange / "a.png").rename(strange / os.fsdecode(b"\xff.png"))
    done = subprocess.run(
        [sys.executable, "-m", "scripts.embed", "--run", run, strange.name, "--out=f.parquet"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "f.parquet: 5 images" in done.stdout
    assert "�.png" in pq.read_table(tmp_path / "f.parquet")["path"].to_pylist()
    shown = subprocess.run(
        [sys.executable, "-m", "scripts.embed", "photos", "--help"], capture_output=True, text=True
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "python -m scripts.embed photos --out=" in shown.stdout
    refused = subprocess.run(
        [sys.executable, "-m", "scripts.embed", "none", f"--run={run}"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2
    assert refused.stderr == "error: folder=none: no such folder; check the path\n"
