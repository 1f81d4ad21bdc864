"""scripts/predict.py: classes of a folder's images, by the classifier's file."""

import csv
import importlib.util
import json

import matplotlib.image
import numpy as np
import pytest
import torch
from PIL import Image
from runs.test_encoder_file import BACKEND, write_encoder

from fedssl.config.compose import load_config
from fedssl.data.decoding import decode
from fedssl.errors import UserError
from fedssl.evaluation.features import extract_features
from fedssl.runs.encoder_file import (
    CLASSIFIER_FILE,
    ENCODER_FILE,
    Classifier,
    load_encoder,
    pack_encoder,
)
from scripts.embed import name_folder
from scripts.export import NEEDED, export
from scripts.predict import predict, prepare

CLASSES = ["blue", "green", "red"]


@pytest.fixture
def run(tmp_path):
    """A run with a classifier on an encoder at random initialization."""
    encoder = write_encoder(tmp_path / "run", "model.stem=imagenet").eval()
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(3, encoder.feature_size, generator=generator)
    classifier = Classifier(weight, torch.zeros(3), CLASSES)
    data = pack_encoder(encoder, 8, "digits", 3, classifier)
    (tmp_path / "run" / CLASSIFIER_FILE).write_bytes(data)
    return tmp_path / "run"


@pytest.fixture
def photos(tmp_path, rng):
    for number in range(6):
        file = tmp_path / "photos" / CLASSES[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)
    (tmp_path / "photos" / "blue" / "broken.png").write_bytes(b"no")
    return tmp_path / "photos"


def settings_of(run, folder, *overrides):
    named = name_folder([str(folder), f"run={run}", *overrides])
    return load_config("predict", ["precision=float32", *named])


def test_every_readable_image_gets_the_class_of_the_classifier(run, photos, tmp_path, capsys):
    out, picture = tmp_path / "predictions.csv", tmp_path / "neighbours.png"
    predict(settings_of(run, photos, f"out={out}", f"neighbours={picture}", "batch_size=2"))
    rows = list(csv.DictReader(out.open()))
    assert [row["label"] for row in rows] == ["blue"] * 3 + ["green"] * 3
    trained = load_encoder(run / CLASSIFIER_FILE)
    pixels = np.stack([decode(photos / row["path"], 8) for row in rows])
    features = extract_features(trained.encoder, pixels, BACKEND, 6, 8)
    scores = features @ trained.classifier.weight.numpy().T
    assert [row["class"] for row in rows] == [CLASSES[best] for best in scores.argmax(axis=1)]
    chances = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    told = [float(row["probability"]) for row in rows]
    np.testing.assert_allclose(told, chances.max(axis=1), atol=1e-4)
    right = sum(row["class"] == row["label"] for row in rows)
    said = capsys.readouterr().out
    assert f"{right} of 6 as their folders say" in said
    assert "1 unreadable files left out: " in said
    assert matplotlib.image.imread(picture).shape[2] == 4


def test_its_file_is_an_encoders_too(run):
    with_head, alone = load_encoder(run / CLASSIFIER_FILE), load_encoder(run / ENCODER_FILE)
    assert alone.classifier is None
    assert with_head.classifier.classes == CLASSES
    for ours, theirs in zip(
        with_head.encoder.state_dict().values(), alone.encoder.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_wrong_files_get_a_line(run, photos):
    with pytest.raises(UserError, match="holds an encoder alone"):
        prepare(settings_of(run, photos, f"classifier={run}/{ENCODER_FILE}"))
    (run / CLASSIFIER_FILE).unlink()
    with pytest.raises(UserError, match=r"python test\.py eval=federated") as error:
        prepare(settings_of(run, photos))
    assert "\n" not in str(error.value)


def test_a_classifier_that_does_not_fit_its_classes_is_refused(run):
    encoder = load_encoder(run / ENCODER_FILE).encoder
    wrong = Classifier(torch.zeros(2, 512), torch.zeros(2), CLASSES)
    (run / CLASSIFIER_FILE).write_bytes(pack_encoder(encoder, 8, "digits", 3, wrong))
    with pytest.raises(UserError, match="for 3 classes"):
        load_encoder(run / CLASSIFIER_FILE)


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED), reason="needs onnxruntime"
)
def test_onnx_gives_the_probabilities(run, tmp_path):
    import onnxruntime

    out = tmp_path / "classifier.onnx"
    export(load_config("export", [f"encoder={run}/{CLASSIFIER_FILE}", f"out={out}"]))
    session = onnxruntime.InferenceSession(out)
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == CLASSES
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    features, chances = session.run(None, {"images": images.numpy()})
    trained = load_encoder(run / CLASSIFIER_FILE)
    with torch.inference_mode():
        expected = trained.classifier.probabilities(trained.encoder(images)).numpy()
    np.testing.assert_allclose(chances, expected, rtol=1e-3, atol=1e-5)
    assert features.shape == (3, 512)
