"""The contract: what an evaluation gets, gives, and leaves in results.json."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
from conftest import ROOT
from evaluation.small import COMMON, HEAD, make_data, make_encoder

from fedssl.data.image_set import Images
from fedssl.errors import UserError
from fedssl.evaluation.base import Evaluation, check_evaluable, draw_labelled
from fedssl.evaluation.finetune import FineTuning
from fedssl.evaluation.linear import LinearEvaluation
from fedssl.evaluation.protocol import evaluate
from fedssl.evaluation.supervised import SupervisedTraining
from fedssl.runs.results import Result, Score

RECORDED = sorted((ROOT / "results").rglob("results.json"))


@dataclass(frozen=True)
class Width(Evaluation):
    """How many features an encoder has, which needs no training."""

    mode = "width"

    thousands: bool

    def run(self, name, encoder, data):
        features = data.features(encoder, data.test.pixels[:3])
        width = features.shape[1] / (1000 if self.thousands else 1)
        return [Score(name, "width", [width] * len(data.seeds), metric="features")]


class Scratch(Width):
    """The same, as if it began afresh."""

    starts_from_scratch = True


def test_a_tenth_of_the_labels_is_stratified_and_seeded(digits):
    rows = draw_labelled(digits.train.labels, 0.1, seed=0)
    assert len(rows) == 143
    counts = np.bincount(digits.train.labels[rows])
    assert counts.min() >= 13
    assert counts.max() <= 15
    assert np.array_equal(rows, draw_labelled(digits.train.labels, 0.1, seed=0))
    assert not np.array_equal(rows, draw_labelled(digits.train.labels, 0.1, seed=1))
    assert len(draw_labelled(digits.train.labels, 1, seed=0)) == 1437


@pytest.mark.parametrize("fraction", [0.001, 0.004])
def test_too_few_labels_are_refused(digits, fraction):
    for refuse in (
        lambda: draw_labelled(digits.train.labels, fraction, seed=0),
        lambda: check_evaluable(digits, fraction, seed=0, num_seeds=1),
        lambda: make_data(digits, label_fraction=fraction),
    ):
        with pytest.raises(UserError, match=f"label_fraction={fraction}.*10 classes") as error:
            refuse()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["test", "test labels", "train labels"])
def test_images_without_labels_cannot_be_evaluated(digits, missing):
    bare = Images(digits.train.pixels, None)
    train = bare if missing == "train labels" else digits.train
    test = {"test": None, "test labels": bare, "train labels": digits.test}[missing]
    images = replace(digits, train=train, test=test)
    with pytest.raises(UserError, match="no labels"):
        check_evaluable(images, 0.1, seed=0, num_seeds=1)
    with pytest.raises(UserError, match="no labels"):
        make_data(images)


def test_draws_differ_and_depend_on_the_seed_alone(digits):
    data, again, other = make_data(digits, 3), make_data(digits, 3), make_data(digits, 3, seed=1)
    assert len({seed for seed, _ in data.draws()}) == 3
    assert (data.num_classes, len(data.labelled[0])) == (10, 143)
    for (seed, rows), (seed_again, rows_again) in zip(data.draws(), again.draws(), strict=True):
        assert seed == seed_again
        assert np.array_equal(rows, rows_again)
    assert not set(data.seeds) & set(other.seeds)


def test_a_new_evaluation_needs_nothing_but_its_class(digits):
    data, encoder = make_data(digits), make_encoder()
    scores = evaluate(Width(**COMMON, thousands=True), encoder, make_encoder(1), data)
    assert [(score.encoder, score.mean) for score in scores] == [
        ("federated SimCLR", 0.512),
        ("random encoder", 0.512),
    ]  # raw pixels have no width
    assert scores[0].to_json()["metric"] == "features"
    alone = Width(**COMMON | {"baselines": False}, thousands=False)
    assert [score.mean for score in evaluate(alone, encoder, encoder, data)] == [512]
    assert alone.protocol() == {"label_fraction": 0.1, "seeds": 2, "thousands": False}


def test_what_starts_from_scratch_gets_the_random_encoder_alone(digits, monkeypatch):
    seen = []
    monkeypatch.setattr(
        Scratch, "run", lambda self, name, *rest: seen.append(rest[0]) or [Score(name, "", [1.0])]
    )
    ours, random = make_encoder(), make_encoder(1)
    scores = evaluate(Scratch(**COMMON, thousands=True), ours, random, make_data(digits))
    assert [score.encoder for score in scores] == ["labels only", "raw pixels"]
    assert seen == [random]


def test_a_run_is_scored_beside_its_baselines(digits):
    settings = LinearEvaluation(**COMMON, **HEAD, knn_neighbors=10)
    scores = evaluate(settings, make_encoder(), make_encoder(), make_data(digits))
    assert [(score.encoder, score.method) for score in scores] == [
        ("federated SimCLR", "linear head"),
        ("federated SimCLR", "converged head"),
        ("federated SimCLR", "kNN"),
        ("random encoder", "linear head"),
        ("random encoder", "converged head"),
        ("random encoder", "kNN"),
        ("raw pixels", "logistic regression"),
    ]
    assert scores[0].top1 == scores[3].top1  # of the same initialization
    assert scores[0].encoder_sha256 == scores[3].encoder_sha256 is not None


def test_the_protocol_has_what_decides_the_scores():
    recorded = ["label_fraction", "seeds", *HEAD]
    linear = LinearEvaluation(**COMMON, **HEAD, knn_neighbors=10)
    finetune = FineTuning(**COMMON, **HEAD, knn_neighbors=10, encoder_learning_rate=0.001)
    supervised = SupervisedTraining(**COMMON, **HEAD)
    assert list(linear.protocol()) == [*recorded, "knn_neighbors"]
    assert list(finetune.protocol()) == [*recorded, "encoder_learning_rate", "knn_neighbors"]
    assert list(supervised.protocol()) == recorded


def test_a_single_draw_has_no_spread():
    assert Score("ours", "kNN", [0.5]).std is None
    assert Score("ours", "kNN", [0.5, 0.7]).std == pytest.approx(np.sqrt(0.02))
    row = Score("ours", "kNN", [0.5, 0.7], encoder_sha256="ab").to_json()
    assert list(row) == ["encoder", "method", "top1", "mean", "std", "encoder_sha256"]


@pytest.mark.skipif(not RECORDED, reason="the recorded results are not here")
def test_what_was_recorded_is_read_and_written_alike():
    for file in RECORDED:
        for entry in json.loads(file.read_text()):
            again = Result.from_json(entry).to_json()
            assert list(again) == list(entry)
            assert json.loads(json.dumps(again)) == entry
