"""scripts/export.py: the encoder as ONNX."""

import importlib.util

import numpy as np
import pytest
import torch
from runs.test_encoder_file import write_encoder

from fedssl.config.compose import load_config
from fedssl.errors import UserError
from scripts import export as program
from scripts.export import NEEDED, export, prepare

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED),
    reason="onnx, onnxscript or onnxruntime is missing; pip install -r requirements-dev.txt",
)


@pytest.fixture
def settings(tmp_path):
    return load_config("export", [f"run={tmp_path}", f"out={tmp_path}/encoder.onnx"])


@needs_onnx
def test_onnx_runtime_gives_the_same_features_for_any_number_of_images(tmp_path, settings, capsys):
    import onnxruntime

    encoder = write_encoder(tmp_path).eval()  # the 3x3 convolutions of small images are special
    export(settings)
    assert "differ by" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx")
    told = session.get_modelmeta().custom_metadata_map
    assert told["dataset"] == "digits"
    assert not {"mean", "std"} & told.keys()  # else a reader would apply them twice
    assert "network itself subtracts the mean" in told["input"]
    for count in (1, 7):
        images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))
        (features,) = session.run(None, {"images": images.numpy()})
        with torch.inference_mode():
            expected = encoder(images).numpy()
        np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)


@needs_onnx
def test_a_network_that_computes_something_else_is_not_kept(tmp_path, settings, monkeypatch):
    write_encoder(tmp_path)
    monkeypatch.setattr(program, "write_onnx", lambda trained, file: file.write_bytes(b"x"))
    monkeypatch.setattr(program, "largest_difference", lambda trained, file: (0.1, 1.0))
    with pytest.raises(RuntimeError, match=r"differ by 0\.1"):
        export(settings)
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.safetensors"]


def test_without_its_packages_it_says_what_to_install(settings, monkeypatch):
    monkeypatch.setattr(program.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="onnxruntime: not installed; pip install -r"):
        prepare(settings)


@needs_onnx
def test_bad_input_gets_one_line(tmp_path, settings):
    with pytest.raises(UserError, match="no encoder"):
        prepare(settings)
    write_encoder(tmp_path)
    settings.out = str(tmp_path)
    with pytest.raises(UserError, match="is a folder"):
        prepare(settings)
