"""The encoder outside of its run: one file, with all that somebody who uses it must know."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedssl.errors import UserError
from fedssl.networks.encoder import Encoder, EncoderSettings
from fedssl.networks.state import load_state

ENCODER_FILE, CLASSIFIER_FILE = "encoder.safetensors", "classifier.safetensors"
WEIGHT, BIAS = "classifier.weight", "classifier.bias"  # beside the encoder's arrays
MAX_IMAGE_SIZE = 4096
INPUT = (
    "RGB; cropped to the square in the middle, resized to image_size x image_size; "
    "values divided by 255, minus mean, divided by std"
)


@dataclass(frozen=True)
class Classifier:
    """A linear layer from features to classes; the softmax of its scores are probabilities.

    Attributes:
        weight: float32 (C, D).
        bias: float32 (C,).
        classes: their names.
    """

    weight: Tensor
    bias: Tensor
    classes: Sequence[str]

    def probabilities(self, features: Tensor) -> Tensor:
        """Give the probability of each class, (N, C), by features (N, D)."""
        return F.linear(features, self.weight, self.bias).softmax(dim=1)


@dataclass(frozen=True)
class TrainedEncoder:
    """An encoder as it was read from a file.

    Attributes:
        encoder: in eval mode, on the CPU.
        image_size: height and width in pixels of the images it was trained on.
        metadata: of the file.
        classifier: on its features, in a classifier's file.
    """

    encoder: Encoder
    image_size: int
    metadata: Mapping[str, str]
    classifier: Classifier | None = None

    def __str__(self) -> str:
        """Name it for a line of the terminal."""
        trained = [
            self.metadata.get("dataset", ""),
            f"{self.image_size} x {self.image_size} pixels",
        ]
        return f"{self.encoder.settings.architecture} ({', '.join(filter(None, trained))})"


def pack_encoder(
    encoder: Encoder,
    image_size: int,
    dataset: str,
    rounds: int,
    classifier: Classifier | None = None,
) -> bytes:
    """Write an encoder as safetensors with torchvision's parameter names.

    The metadata (text, lists as JSON) tells how to build the network and how to
    prepare images for it.

    Args:
        image_size: side in pixels of the images that it is to be used on.
        dataset: name of what it was trained on.
        rounds: that it was trained.
        classifier: to write beside it, as `classifier.weight` and `classifier.bias`; the names
            of its classes are in the metadata.
    """
    settings = encoder.settings
    metadata = {
        "architecture": settings.architecture,
        "stem": settings.stem,
        "norm": settings.norm,
        "features": str(encoder.feature_size),
        "image_size": str(image_size),
        "mean": json.dumps(list(settings.mean)),
        "std": json.dumps(list(settings.std)),
        "input": INPUT,
        "dataset": dataset,
        "rounds": str(rounds),
    }
    tensors = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
    if classifier:
        metadata["classes"] = json.dumps(list(classifier.classes))
        tensors |= {WEIGHT: classifier.weight, BIAS: classifier.bias}
    return _sort_header(save(tensors, metadata=metadata))


def _sort_header(data: bytes) -> bytes:
    """Put the keys of a safetensors header in order, so that equal encoders are equal files.

    The library writes its metadata in another order each time. A header is JSON behind its
    length in 8 bytes, and filled up with spaces
    (https://github.com/huggingface/safetensors#format).
    """
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[end:]


def find_encoder(encoder: str | None, run: str, name: str = ENCODER_FILE) -> Path:
    """Choose the file of `--encoder`, else that of the run.

    Args:
        name: of the file in a run; that of a classifier is asked for by `--classifier`.

    Raises:
        UserError: there is none.
    """
    key = name.partition(".")[0]
    if encoder:
        file = Path(encoder).expanduser()
        if not file.is_file():
            raise UserError(f"{key}={encoder}: no such file; give a {name} of a run")
        return file
    file = Path(run).expanduser() / name
    if not file.is_file():
        first = "" if name == ENCODER_FILE else "evaluate it with python test.py eval=federated, "
        raise UserError(
            f"run={run}: no {name} there; {first}give the directory of a run of main.py that "
            f"has ended, or {key}=FILE"
        )
    return file


def read_classes(file: Path) -> list[str]:
    """Read the names of a classifier's classes; none where there is no such file."""
    try:
        with safe_open(file, framework="pt") as opened:
            return [str(name) for name in json.loads((opened.metadata() or {})["classes"])]
    except (OSError, SafetensorError, KeyError, ValueError):
        return []


def load_encoder(file: Path) -> TrainedEncoder:
    """Read what `pack_encoder` wrote.

    Raises:
        UserError: a file that is damaged or of another kind.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        size = int(metadata["image_size"])
        if not 1 <= size <= MAX_IMAGE_SIZE:
            raise ValueError(f"image_size {size}")
        mean, std = json.loads(metadata["mean"]), json.loads(metadata["std"])
        norm = metadata.get("norm", "batch")  # before there was another
        settings = EncoderSettings(metadata["architecture"], metadata["stem"], mean, std, norm)
        encoder = Encoder(settings)
        classifier = _take_classifier(state, metadata, encoder.feature_size)
        load_state(encoder, state)
    except KeyError as error:
        raise UserError(f"encoder={file}: no {error} in its metadata, so not of a run") from error
    except (OSError, SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"encoder={file}: damaged, or not the encoder of a run ({error}); use another"
        ) from error
    encoder = encoder.eval().to(memory_format=torch.channels_last)
    return TrainedEncoder(encoder, size, metadata, classifier)


def _take_classifier(
    state: dict[str, Tensor], metadata: Mapping[str, str], features: int
) -> Classifier | None:
    """Take the classifier out of a file's arrays, if there is one.

    Raises:
        ValueError: its arrays and class names don't fit.
    """
    if "classes" not in metadata:
        return None
    classes, weight, bias = json.loads(metadata["classes"]), state.pop(WEIGHT), state.pop(BIAS)
    if weight.shape != (len(classes), features) or bias.shape != (len(classes),):
        raise ValueError(f"a classifier of shape {tuple(weight.shape)} for {len(classes)} classes")
    return Classifier(weight, bias, classes)
