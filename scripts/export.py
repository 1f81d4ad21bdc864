"""The encoder that a run has trained as ONNX, for use without PyTorch.

python -m scripts.export --out=encoder.onnx
python -m scripts.export --encoder=encoder.safetensors
"""

from fedssl.config.help import answer

if __name__ == "__main__":
    answer("export")  # before the imports below, which take seconds


import importlib.util
import warnings
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from fedssl.config.command_line import run_entry
from fedssl.errors import UserError
from fedssl.files import check_replaceable, replacing
from fedssl.runs.encoder_file import TrainedEncoder, find_encoder, load_encoder

NEEDED = ("onnx", "onnxscript", "onnxruntime")
BATCH_SIZES = (2, 5)  # of the export and the comparison: any other will do
TOLERANCE = 1e-3  # of the largest feature
INPUT = (
    "RGB; cropped to the square in the middle, resized to image_size x image_size; values "
    "divided by 255; the network itself subtracts the mean and divides by the deviation"
)


def prepare(settings: DictConfig) -> TrainedEncoder:
    """Check all that can be checked before any work starts.

    Raises:
        UserError: the first thing that is wrong.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)}: not installed; pip install -r requirements-dev.txt")
    check_replaceable("out", settings.out)
    return load_encoder(find_encoder(settings.encoder, settings.run))


class Network(nn.Module):
    """An encoder and, if there is one, its classifier."""

    def __init__(self, trained: TrainedEncoder) -> None:
        super().__init__()
        self.encoder, self.classifier = trained.encoder, trained.classifier

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Give features (N, D), and probabilities (N, C)."""
        features = self.encoder(images)
        return (features, *([self.classifier.probabilities(features)] if self.classifier else []))


def write_onnx(trained: TrainedEncoder, file: Path) -> None:
    """Write the network from images to features, channel statistics included.

    Input `images`: float32 (N, 3, image_size, image_size) in [0, 1]; output
    `features`: float32 (N, feature_size), and of a classifier `probabilities`, float32
    (N, classes); any N. The metadata is the encoder's, without the channel statistics, which
    nobody has to apply any more.
    """
    images = torch.rand(BATCH_SIZES[0], 3, trained.image_size, trained.image_size)
    with warnings.catch_warnings(action="ignore"):  # of the exporter about itself
        program = torch.onnx.export(
            Network(trained),
            (images,),
            input_names=["images"],
            output_names=["features", *(["probabilities"] if trained.classifier else [])],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            dynamo=True,
            verbose=False,
        )
    kept = {key: text for key, text in trained.metadata.items() if key not in ("mean", "std")}
    program.model.metadata_props.update({**kept, "input": INPUT})
    program.save(file)


def largest_difference(trained: TrainedEncoder, file: Path) -> tuple[float, float]:
    """Compare ONNX Runtime with PyTorch on random images.

    Returns:
        The largest absolute difference of an output as a share of that output's largest value,
        times the largest feature; and the largest feature.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    size = trained.image_size
    images = torch.rand(BATCH_SIZES[1], 3, size, size, generator=torch.Generator().manual_seed(0))
    outputs = session.run(None, {"images": images.numpy()})
    with torch.inference_mode():
        expected = [output.numpy() for output in Network(trained).eval()(images)]
    largest = [float(np.abs(each).max()) for each in expected]
    apart = [
        float(np.abs(a - b).max()) / scale
        for a, b, scale in zip(outputs, expected, largest, strict=True)
    ]
    return max(apart) * largest[0], largest[0]


def export(settings: DictConfig) -> None:
    """Write the file if it gives PyTorch's features; say how well they agree."""
    trained = prepare(settings)
    out = Path(settings.out).expanduser()
    try:
        with replacing(out) as temporary:
            write_onnx(trained, temporary)
            difference, largest = largest_difference(trained, temporary)
            if not difference <= TOLERANCE * largest:
                raise RuntimeError(
                    f"ONNX Runtime's features differ by {difference:.2g} from PyTorch's "
                    f"(up to {largest:.2g}); nothing was written"
                )
    except OSError as error:
        raise RuntimeError(f"can't write {out}: {error}") from error
    print(f"{out}: {trained}, images (N, 3, {trained.image_size}, {trained.image_size}) in [0, 1]")
    print(f"ONNX Runtime and PyTorch differ by {difference:.1e} at most, of up to {largest:.1f}")


if __name__ == "__main__":
    run_entry("export", prepare, export)
