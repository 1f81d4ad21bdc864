"""From configuration to objects: what every process prepares alike."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from fedssl.errors import UserError
from fedssl.networks.encoder import stem_for
from fedssl.networks.state import load_state
from fedssl.runs.checkpoints import load_checkpoint
from model import SimCLR


def build_model(
    model: Mapping[str, Any], dataset: Mapping[str, Any], seed: int, device: torch.device
) -> SimCLR:
    """Build the network of a run at the initialization that the seed gives.

    Args:
        model, dataset: these sections of the configuration; the stem "auto"
            follows the image size.
    """
    stem = stem_for(dataset["image_size"]) if model["stem"] == "auto" else model["stem"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = SimCLR(
            model["encoder"],
            stem,
            model["projection_hidden"],
            model["projection_size"],
            dataset["mean"],
            dataset["std"],
            model["deep_supervision"],
        )
    return built.to(device, memory_format=torch.channels_last)


def load_trained(config: DictConfig, checkpoint: Path, device: torch.device) -> tuple[SimCLR, int]:
    """Load a checkpoint of a run; return the model and its round.

    Raises:
        UserError: a damaged checkpoint, or one of another architecture.
    """
    model = build_model(config.model, config.dataset, config.seed, device)
    loaded = load_checkpoint(checkpoint)
    try:
        load_state(model, loaded.state)
    except ValueError as error:
        raise UserError(
            f"checkpoint={checkpoint}: of another architecture than {config.model.encoder} "
            f"with stem {model.stem} ({error}); evaluate it with its own run"
        ) from error
    return model, loaded.round
