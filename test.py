"""Linear evaluation: how good is the representation that a run has learned?

python test.py                          # the newest run
python test.py run=outputs/DATE/TIME label_fraction=0.02 seeds=5
python test.py checkpoint=FILE
python test.py eval=finetune            # the encoder is tuned too
python test.py eval=supervised          # instead: the same network on the labels alone
python test.py dataset=imagefolder dataset.path=labelled label_fraction=1
"""

from fedssl.config.help import answer

if __name__ == "__main__":
    answer("test")  # before the imports below, which take seconds

import copy
import hashlib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import nn

from fedssl.compute import choose_device, choose_dtype
from fedssl.config.command_line import run_entry
from fedssl.config.evaluation import choose_images, follow_run, refuse_preparation
from fedssl.data.cache import open_image_set
from fedssl.data.image_set import ImageSet
from fedssl.data.views import make_augmentation
from fedssl.errors import UserError
from fedssl.evaluation.features import extract_features
from fedssl.evaluation.finetune import finetune
from fedssl.evaluation.knn import knn_accuracy
from fedssl.evaluation.linear import draw_labelled, train_linear_head
from fedssl.evaluation.supervised import train_supervised
from fedssl.reporting.console import Waiting, make_report, print_results
from fedssl.runs.checkpoints import load_checkpoint
from fedssl.runs.directory import RunDirectory
from fedssl.runs.provenance import provenance
from fedssl.seeding import derive_seed
from fedssl.training.schedule import encode_size
from model import SimCLR
from utils import build_model, load_trained, open_source

PROTOCOL = (
    *("label_fraction", "seeds", "epochs", "batch_size", "learning_rate", "weight_decay"),
    *("encoder_learning_rate", "knn_neighbors"),
)


def state_digest(module: nn.Module) -> str:
    """Hash every parameter and buffer of a module, names included."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class Evaluation:
    """One protocol, applied alike to several encoders of the same run."""

    def __init__(
        self,
        config: DictConfig,
        settings: DictConfig,
        image_set: ImageSet,
        round_number: int | None = None,
    ) -> None:
        """Draw the labelled rows of every seed.

        Args:
            config: of the run that trained the encoder.
            settings: the `eval` section.
            round_number: of the checkpoint, which decides the size of the
                images where it grew; None for the last.

        Raises:
            UserError: no labels, or too few.
        """
        check_evaluable(settings, image_set, config.seed)
        self.config, self.settings = config, settings
        self.train, self.test = image_set.train, image_set.test
        self.num_classes = int(max(self.train.labels.max(), self.test.labels.max())) + 1
        self.device = choose_device()
        self.dtype = choose_dtype(config.precision, self.device)
        place = round_number or config.num_rounds, config.num_rounds
        image_size = config.dataset.image_size
        self.encode_size = encode_size(config.train, image_size, *place)
        self.seeds = [derive_seed(config.seed, "labels", i) % 2**32 for i in range(settings.seeds)]
        self.labelled = [
            draw_labelled(self.train.labels, settings.label_fraction, seed) for seed in self.seeds
        ]

    def frozen(self, name: str, model: SimCLR) -> list[dict[str, Any]]:
        """Score a linear head and kNN over the frozen encoder.

        Raises:
            RuntimeError: the encoder changed, which would be a defect.
        """
        before = state_digest(model.encoder)
        rows = np.unique(np.concatenate(self.labelled))
        features = self._features(model, self.train.pixels[rows])
        test_features = self._features(model, self.test.pixels)
        linear, knn = [], []
        for seed, labelled in zip(self.seeds, self.labelled, strict=True):
            bank, labels = features[np.searchsorted(rows, labelled)], self.train.labels[labelled]
            predict = train_linear_head(bank, labels, self.num_classes, self.settings, seed)
            linear.append(float((predict(test_features) == self.test.labels).mean()))
            neighbors = self.settings.knn_neighbors
            knn.append(knn_accuracy(bank, labels, test_features, self.test.labels, neighbors))
        if state_digest(model.encoder) != before:
            raise RuntimeError("the frozen encoder changed during the evaluation")
        return [
            row(name, "linear head", linear) | {"encoder_sha256": before},
            row(name, "kNN", knn) | {"encoder_sha256": before},
        ]

    def tuned(self, name: str, model: SimCLR) -> list[dict[str, Any]]:
        """Score the encoder tuned together with its head, from the same start for each seed."""
        return [row(name, "fine-tuned", self._train_whole(model, finetune, self.settings))]

    def supervised(self, name: str, model: SimCLR) -> list[dict[str, Any]]:
        """Score the network trained on the labelled images alone, from these weights."""
        settings = self.settings.supervised
        return [row(name, "supervised", self._train_whole(model, train_supervised, settings))]

    def _train_whole(
        self, model: SimCLR, train: Callable[..., nn.Module], settings: Mapping[str, Any]
    ) -> list[float]:
        scores = []
        augmentation = make_augmentation(self.config.augment, self.encode_size)
        for seed, labelled in zip(self.seeds, self.labelled, strict=True):
            tuned = copy.deepcopy(model)
            head = train(
                tuned,
                np.asarray(self.train.pixels[labelled]),
                self.train.labels[labelled],
                self.num_classes,
                augmentation,
                settings,
                self.dtype,
                seed,
            )
            features = torch.from_numpy(self._features(tuned, self.test.pixels)).to(self.device)
            with torch.inference_mode():
                predicted = head(features).argmax(dim=1).cpu().numpy()
            scores.append(float((predicted == self.test.labels).mean()))
        return scores

    def raw_pixels(self) -> dict[str, Any]:
        """Score logistic regression on the pixels: what can be had without any encoder."""
        scores = []
        test = self.test.pixels.reshape(len(self.test.pixels), -1) / np.float32(255)
        for labelled in self.labelled:
            pixels = self.train.pixels[labelled].reshape(len(labelled), -1) / np.float32(255)
            classifier = LogisticRegression(max_iter=200)
            with warnings.catch_warnings():  # digits need 70 steps, large images are stopped
                warnings.simplefilter("ignore", ConvergenceWarning)
                classifier.fit(pixels, self.train.labels[labelled])
            scores.append(float(classifier.score(test, self.test.labels)))
        return row("raw pixels", "logistic regression", scores)

    def _features(self, model: SimCLR, pixels: np.ndarray) -> np.ndarray:
        batch, size = self.settings.feature_batch_size, self.encode_size
        return extract_features(model, pixels, self.device, self.dtype, batch, size)


def row(encoder: str, method: str, scores: list[float]) -> dict[str, Any]:
    """Summarize the top-1 of several seeds: mean and sample standard deviation."""
    spread = float(np.std(scores, ddof=1)) if len(scores) > 1 else None
    return {
        "encoder": encoder,
        "method": method,
        "top1": scores,
        "mean": float(np.mean(scores)),
        "std": spread,
    }


def check_evaluable(settings: Mapping[str, Any], image_set: ImageSet, seed: int) -> None:
    """Make sure that there are labels, and enough of them, before any work starts.

    Raises:
        UserError: no labelled test images, or too few training labels.
    """
    if not image_set.labelled:
        raise UserError("these images have no labels, so there is nothing to evaluate against")
    draw_labelled(image_set.train.labels, settings["label_fraction"], seed)


def evaluate_run(
    run: RunDirectory,
    config: DictConfig,
    settings: DictConfig,
    image_set: ImageSet,
    checkpoint: Path,
) -> dict[str, Any]:
    """Evaluate a checkpoint, if asked beside a random encoder and the raw pixels; record it.

    Raises:
        UserError: no labels, or a checkpoint of another architecture.
    """
    model, round_number = load_trained(config, checkpoint, choose_device())
    evaluation = Evaluation(config, settings, image_set, round_number)
    random_model = build_model(config.model, config.dataset, config.seed, evaluation.device)
    protocol = {key: settings[key] for key in PROTOCOL}
    if settings.mode == "supervised":
        protocol |= settings.supervised
        rows = evaluation.supervised("labels only", random_model)
    else:
        score = evaluation.tuned if settings.mode == "finetune" else evaluation.frozen
        rows = score("federated SimCLR", model)
        if settings.baselines:
            rows += score("random encoder", random_model)
    if settings.baselines:
        rows.append(evaluation.raw_pixels())
    result = {
        "mode": settings.mode,
        "dataset": config.dataset.name,
        "protocol": protocol,
        "round": round_number,
        "labelled_images": len(evaluation.labelled[0]),
        "test_images": len(evaluation.test.pixels),
        "rows": rows,
        "seed": config.seed,
        "checkpoint": checkpoint.name,
        "precision": str(evaluation.dtype).removeprefix("torch."),
        "measured": provenance(),
    }
    run.add_result(result)
    return result


def find_checkpoint(settings: DictConfig) -> tuple[RunDirectory, Path]:
    """Find what to evaluate: a given file, or the last checkpoint of a run.

    Raises:
        UserError: neither is there.
    """
    if settings.checkpoint:
        checkpoint = Path(settings.checkpoint).expanduser()
        load_checkpoint(checkpoint)  # says more about a wrong path than a missing run would
        return RunDirectory(checkpoint.resolve().parent.parent), checkpoint
    run = RunDirectory(Path(settings.run).expanduser().resolve())
    run.load_config()
    return run, run.last_checkpoint()


def prepare(settings: DictConfig) -> tuple[RunDirectory, DictConfig, ImageSet, Path]:
    """Open all that an evaluation needs, so that nothing fails after the work.

    Raises:
        UserError: a checkpoint, run or image set that can't be used.
    """
    run, checkpoint = find_checkpoint(settings)
    config = run.load_config()
    config.precision = settings.precision
    follow_run(settings, config)
    choose_images(config, settings)
    load_trained(config, checkpoint, choose_device())
    report = make_report(settings.quiet)
    size, source = config.dataset.image_size, open_source(config.dataset)
    image_set = open_image_set(source, size, settings.cache_dir, config.seed, report)
    check_evaluable(settings, image_set, config.seed)
    return run, config, image_set, checkpoint


def evaluate(settings: DictConfig) -> None:
    """Evaluate a run as the command line asks; print and record the result."""
    run, config, image_set, checkpoint = prepare(settings)
    if not settings.quiet:
        print(f"Evaluating {checkpoint} on {config.dataset.name}\n")
    with Waiting("evaluation", settings.quiet):
        result = evaluate_run(run, config, settings, image_set, checkpoint)
    print_results(result)
    if not settings.quiet:
        print(f"Recorded in {run.results}")


if __name__ == "__main__":
    run_entry("test", prepare, evaluate, refuse_preparation)
