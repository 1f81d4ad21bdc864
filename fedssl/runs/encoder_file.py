"""The encoder outside of its run: one file, with all that somebody who uses it must know."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedssl.errors import UserError
from fedssl.networks.encoder import Encoder
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
        model: in eval mode, on the CPU.
        image_size: height and width in pixels of the images it was trained on.
        facts: the file's metadata.
    """

    model: Encoder
    image_size: int
    facts: Mapping[str, str]

    def __str__(self) -> str:
        """Name it for a line of the terminal."""
        trained = [self.facts.get("dataset", ""), f"{self.image_size} x {self.image_size} pixels"]
        return f"{self.model.architecture} ({', '.join(filter(None, trained))})"


def pack_encoder(model: Encoder, dataset: Mapping[str, Any], rounds: int) -> bytes:
    """Write an encoder as safetensors with torchvision's parameter names.

    The metadata (text, lists as JSON) tells how to build the network and how to
    prepare images for it.

    Args:
        dataset: this section of the configuration.
        rounds: that it was trained.
    """
    facts = {
        "architecture": model.architecture,
        "stem": model.stem,
        "features": str(model.feature_size),
        "image_size": str(dataset["image_size"]),
        "mean": json.dumps(list(dataset["mean"])),
        "std": json.dumps(list(dataset["std"])),
        "input": INPUT,
        "dataset": str(dataset["name"]),
        "rounds": str(rounds),
    }
    tensors = {name: tensor.contiguous() for name, tensor in model.encoder.state_dict().items()}
    return save(tensors, metadata=facts)


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
            facts = opened.metadata() or {}
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        size = int(facts["image_size"])
        if not 1 <= size <= MAX_IMAGE_SIZE:
            raise ValueError(f"image_size {size}")
        mean, std = json.loads(facts["mean"]), json.loads(facts["std"])
        model = Encoder(facts["architecture"], facts["stem"], mean, std)
        load_state(model.encoder, state)
    except KeyError as error:
        raise UserError(f"encoder={file}: no {error} in its metadata, so not of a run") from error
    except (OSError, SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"encoder={file}: damaged, or not the encoder of a run ({error}); use another"
        ) from error
    return TrainedEncoder(model.eval().to(memory_format=torch.channels_last), size, facts)
