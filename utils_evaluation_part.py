"""Evaluations of a run: to be merged into utils.py, which has the functions imported here."""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.utils import get_class
from omegaconf import DictConfig

from fedssl.compute import Backend, choose_backend
from fedssl.data.image_set import ImageSet
from fedssl.runs.directory import RunDirectory
from fedssl.runs.provenance import provenance
from utils import build_method, build_schedule, build_views, load_trained

if TYPE_CHECKING:  # a client, which imports this file for every message, evaluates nothing
    from fedssl.evaluation.base import Evaluation, EvaluationData
    from fedssl.evaluation.protocol import Result
    from fedssl.reporting.sections import Encoders


def open_evaluation(
    settings: DictConfig,
    config: DictConfig,
    image_set: ImageSet,
    round_number: int,
    backend: Backend,
) -> tuple["Evaluation", "EvaluationData"]:
    """Build a protocol and draw the labels that it gives.

    Args:
        settings: the `eval` section, or those of test.py, which have its keys at the top.
        config: of the run that trained the encoder.
        round_number: of the checkpoint, which decides the size of the images.

    Raises:
        UserError: no labels, or too few.
    """
    from fedssl.evaluation.base import EvaluationData

    protocol = get_class(settings._target_)
    evaluation = protocol(**{field.name: settings[field.name] for field in fields(protocol)})
    resolution = build_schedule(config).eval_resolution(round_number)
    data = EvaluationData.of(
        image_set,
        label_fraction=evaluation.label_fraction,
        num_seeds=evaluation.seeds,
        seed=config.seed,
        resolution=resolution,
        views=build_views(config, resolution),
        backend=backend,
        feature_batch_size=evaluation.feature_batch_size,
    )
    return evaluation, data


def evaluate_run(
    run: RunDirectory,
    config: DictConfig,
    settings: DictConfig,
    image_set: ImageSet,
    checkpoint: Path,
) -> "Result":
    """Evaluate a checkpoint, if asked beside a random encoder and the raw pixels; record it.

    Raises:
        UserError: no labels, or a checkpoint of another architecture.
    """
    from fedssl.evaluation.protocol import Result, evaluate

    backend = choose_backend(config.precision)
    method, round_number = load_trained(config, checkpoint, backend.device)
    evaluation, data = open_evaluation(settings, config, image_set, round_number, backend)
    untrained = build_method(config, backend.device).encoder
    result = Result(
        mode=evaluation.mode,
        dataset=config.dataset.name,
        protocol=evaluation.protocol(),
        round=round_number,
        labelled_images=len(data.labelled[0]),
        test_images=len(data.test.pixels),
        rows=evaluate(evaluation, method.encoder, untrained, data),
        seed=config.seed,
        checkpoint=checkpoint.name,
        precision=str(backend.dtype).removeprefix("torch."),
        measured=provenance(),
    )
    run.add_result(result.to_json())
    return result


def load_encoders(run: RunDirectory, config: DictConfig) -> "Encoders":
    """Load what the report of a run shows: its encoder, and the same before training.

    Raises:
        UserError: no checkpoint, or a damaged one.
    """
    from fedssl.reporting.sections import Encoders

    backend = choose_backend(config.precision)
    method, round_number = load_trained(config, run.last_checkpoint(), backend.device)
    untrained = build_method(config, backend.device).encoder
    resolution = build_schedule(config).eval_resolution(round_number)
    return Encoders(untrained, method.encoder, round_number, resolution, backend)
