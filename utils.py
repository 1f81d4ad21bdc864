"""From configuration to objects: what every process prepares alike."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig

from fedssl.data.sources.base import Source
from fedssl.errors import UserError
from fedssl.networks.encoder import stem_for
from fedssl.networks.state import load_state
from fedssl.runs.checkpoints import load_checkpoint
from model import SimCLR

# Keys of the `dataset` section that are not the source's.
NOT_THE_SOURCES = ("source", "image_size", "mean", "std")


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


def open_source(section: Mapping[str, Any]) -> Source:
    """Make the source of images that the `dataset` section describes; opens no image yet.

    Raises:
        UserError: the section names no source, or does not suit it.
    """
    arguments = {key: value for key, value in section.items() if key not in NOT_THE_SOURCES}
    try:
        source = instantiate(arguments)
    except InstantiationException as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"dataset: {reason}") from error
    if not isinstance(source, Source):
        raise UserError(f"dataset._target_={arguments.get('_target_')}: no source of images")
    return source


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
