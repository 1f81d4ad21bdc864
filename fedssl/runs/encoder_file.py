"""The encoder outside of its run: one file, with all that somebody who uses it must know."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedssl.errors import UserError
from fedssl.networks.encoder import Encoder, EncoderSettings
from fedssl.networks.state import load_state

ENCODER_FILE = "encoder.safetensors"
MAX_IMAGE_SIZE = 4096
INPUT = (
    "RGB; cropped to the square in the middle, resized to image_size x image_size; "
    "values divided by 255, minus mean, divided by std"
)


@dataclass(frozen=True)
class TrainedEncoder:
    """An encoder as it was read from a file.

    Attributes:
        encoder: in eval mode, on the CPU.
        image_size: height and width in pixels of the images it was trained on.
        metadata: of the file.
    """

    encoder: Encoder
    image_size: int
    metadata: Mapping[str, str]

    def __str__(self) -> str:
        """Name it for a line of the terminal."""
        trained = [
            self.metadata.get("dataset", ""),
            f"{self.image_size} x {self.image_size} pixels",
        ]
        return f"{self.encoder.settings.architecture} ({', '.join(filter(None, trained))})"


def pack_encoder(encoder: Encoder, image_size: int, dataset: str, rounds: int) -> bytes:
    """Write an encoder as safetensors with torchvision's parameter names.

    The metadata (text, lists as JSON) tells how to build the network and how to
    prepare images for it.

    Args:
        image_size: side in pixels of the images that it is to be used on.
        dataset: name of what it was trained on.
        rounds: that it was trained.
    """
    settings = encoder.settings
    metadata = {
        "architecture": settings.architecture,
        "stem": settings.stem,
        "features": str(encoder.feature_size),
        "image_size": str(image_size),
        "mean": json.dumps(list(settings.mean)),
        "std": json.dumps(list(settings.std)),
        "input": INPUT,
        "dataset": dataset,
        "rounds": str(rounds),
    }
    tensors = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
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


def find_encoder(encoder: str | None, run: str) -> Path:
    """Choose the file of `--encoder`, else that of the run.

    Raises:
        UserError: there is none.
    """
    if encoder:
        file = Path(encoder).expanduser()
        if not file.is_file():
            raise UserError(f"encoder={encoder}: no such file; give an {ENCODER_FILE} of a run")
        return file
    file = Path(run).expanduser() / ENCODER_FILE
    if not file.is_file():
        raise UserError(
            f"run={run}: no {ENCODER_FILE} there; give the directory of a run of main.py that "
            "has ended, or encoder=FILE"
        )
    return file


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
        settings = EncoderSettings(metadata["architecture"], metadata["stem"], mean, std)
        encoder = Encoder(settings)
        load_state(encoder, state)
    except KeyError as error:
        raise UserError(f"encoder={file}: no {error} in its metadata, so not of a run") from error
    except (OSError, SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"encoder={file}: damaged, or not the encoder of a run ({error}); use another"
        ) from error
    encoder = encoder.eval().to(memory_format=torch.channels_last)
    return TrainedEncoder(encoder, size, metadata)
