"""The encoder in a file of its own: read by this project, and by plain torchvision."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT
from PIL import Image
from safetensors.torch import save_file

from fedssl.compute import Backend
from fedssl.config.compose import load_config
from fedssl.data.decoding import decode
from fedssl.errors import UserError
from fedssl.evaluation.features import extract_features
from fedssl.networks.encoder import Encoder, EncoderSettings, stem_for
from fedssl.runs.encoder_file import ENCODER_FILE, find_encoder, load_encoder, pack_encoder

BACKEND = Backend(CPU, torch.float32)

PAGE = (ROOT / "docs" / "own-images.md").read_text()
ELSEWHERE = PAGE.partition("## The encoder elsewhere")[2]
SNIPPET = re.search(r"```python\n(.*?)```", ELSEWHERE, re.DOTALL)[1]
ENDING = """
import sys
assert not {"model", "encoder", "utils"} & sys.modules.keys()
print(json.dumps(features[0].tolist()))
"""


def run_snippet(folder):
    """Run the page's lines in a process that can't see this project; return the features."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", SNIPPET + ENDING], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return np.array(json.loads(done.stdout), dtype=np.float32)


def write_encoder(folder, *overrides):
    """Write an encoder whose BatchNorm has seen images, as a run does; return it."""
    config = load_config("config", overrides)
    dataset, stem = config.dataset, config.model.stem
    size = dataset.image_size
    stem = stem_for(size) if stem == "auto" else stem
    statistics = list(dataset.mean), list(dataset.std)
    settings = EncoderSettings(config.model.encoder, stem, *statistics, config.model.norm)
    encoder = Encoder(settings).to(memory_format=torch.channels_last)
    encoder(torch.rand(8, 3, size, size, generator=torch.Generator().manual_seed(0)))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ENCODER_FILE).write_bytes(pack_encoder(encoder, size, dataset.name, rounds=3))
    return encoder


@pytest.fixture
def file(tmp_path):
    write_encoder(tmp_path)
    return tmp_path / ENCODER_FILE


@pytest.mark.parametrize(
    ("overrides", "image_shape"),
    [
        ([], (8, 8)),
        (["model=resnet50", "dataset.image_size=48"], (48, 48)),
        (["model.stem=imagenet", "dataset=cifar10"], (40, 56)),
        (["model.norm=group"], (8, 8)),
    ],
    ids=["resnet18, stride 1", "resnet50, stride 2", "resnet18, imagenet", "GroupNorm"],
)
def test_the_pages_lines_give_the_same_features_as_this_project(
    tmp_path, rng, overrides, image_shape
):
    write_encoder(tmp_path / "outputs" / "latest", *overrides)
    pixels = rng.integers(0, 256, (*image_shape, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    compare_snippet(tmp_path)


def compare_snippet(folder):
    """The page's lines and the project's own way give the same features of photo.png."""
    theirs = run_snippet(folder)
    trained = load_encoder(find_encoder(None, str(folder / "outputs" / "latest")))
    images = decode(folder / "photo.png", trained.image_size)[None]
    ours = extract_features(trained.encoder, images, BACKEND, 1, trained.image_size)[0]
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["turned JPEG", "transparent", "12 bits"])
def test_the_pages_lines_take_odd_images_as_this_project_does(tmp_path, rng, kind):
    write_encoder(tmp_path / "outputs" / "latest", "dataset=cifar10")
    colours = Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8))
    place = tmp_path / "photo.png"  # the ending decides nothing
    if kind == "turned JPEG":
        exif = Image.Exif()
        exif[0x112] = 6
        colours.save(place, "JPEG", exif=exif)
    elif kind == "transparent":
        colours.putalpha(Image.fromarray(rng.integers(0, 256, (40, 56), dtype=np.uint8)))
        colours.save(place)
    else:
        Image.fromarray(rng.integers(0, 4096, (40, 56)).astype(np.uint16)).save(place)
    compare_snippet(tmp_path)


def test_equal_encoders_are_equal_files():
    encoder = Encoder(EncoderSettings("resnet18", "imagenet", [0.5] * 3, [0.2] * 3))
    files = {pack_encoder(encoder, 32, "digits", rounds=3) for _ in range(20)}
    assert len(files) == 1


def test_what_is_written_is_read(tmp_path, digits):
    encoder = write_encoder(tmp_path)
    trained = load_encoder(tmp_path / ENCODER_FILE)
    ours, theirs = (
        extract_features(each, digits.test.pixels[:10], BACKEND, 10, 8)
        for each in (encoder, trained.encoder)
    )
    np.testing.assert_array_equal(ours, theirs)
    assert trained.image_size == 8
    assert trained.metadata["dataset"] == "digits"
    assert trained.metadata["rounds"] == "3"
    assert str(trained) == "resnet18 (digits, 8 x 8 pixels)"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncated", "damaged, or not the encoder of a run"),
        ("text", "damaged, or not the encoder of a run"),
        ("empty", "damaged, or not the encoder of a run"),
        ("other tensors", "no 'image_size' in its metadata"),
        ("another stem", "shape"),
        ("wrong statistics", "damaged"),
    ],
)
def test_a_file_that_is_no_encoder_gets_one_line(file, damage, message):
    data = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "text":
        file.write_text("these are not the weights you are looking for")
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "other tensors":
        save_file({"weight": torch.zeros(3)}, file)
    elif damage == "another stem":
        file.write_bytes(data.replace(b'"conv3x3_stride1"', b'"imagenet"       '))
    elif damage == "wrong statistics":
        file.write_bytes(data.replace(b"[0.31, 0.31, 0.31]", b"[0.31, 0.31      ]"))
    with pytest.raises(UserError, match=message) as error:
        load_encoder(file)
    assert str(file) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_an_encoder_that_is_not_there_gets_one_line(tmp_path, file):
    assert find_encoder(None, str(tmp_path)) == find_encoder(str(file), "/nowhere") == file
    with pytest.raises(UserError, match=r"encoder=/nowhere: no such file"):
        find_encoder("/nowhere", str(tmp_path))
    with pytest.raises(UserError, match=r"run=/nowhere: no encoder\.safetensors there"):
        find_encoder(None, "/nowhere")
