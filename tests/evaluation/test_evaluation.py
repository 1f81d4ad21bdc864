"""The linear evaluation, test.py."""

import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import test as evaluation
from fedssl.config.compose import load_config
from fedssl.data.image_set import Images, ImageSet
from fedssl.errors import UserError
from fedssl.evaluation.linear import draw_labelled, train_linear_head
from fedssl.runs.checkpoints import Checkpoint, save_checkpoint
from fedssl.runs.directory import RunDirectory
from test import (
    Evaluation,
    evaluate_run,
    find_checkpoint,
    state_digest,
)
from utils import build_model

CPU = torch.device("cpu")


@pytest.fixture
def settings():
    return load_config("test", ["epochs=5", "learning_rate=0.03", "weight_decay=0.1"])


@pytest.fixture
def run(tmp_path, config, model):
    directory = RunDirectory.create(tmp_path / "run", config)
    save_checkpoint(directory.checkpoints, Checkpoint(3, model.state_dict()), keep=1)
    return directory


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
    with pytest.raises(UserError, match=f"label_fraction={fraction}.*10 classes") as error:
        draw_labelled(digits.train.labels, fraction, seed=0)
    assert "\n" not in str(error.value)


def test_a_linear_head_learns_what_is_linear(settings, rng):
    features = rng.normal(size=(300, 5)).astype(np.float32) * [1, 10, 100, 1, 1] + 50
    labels = (features[:, 1] > 50).astype(np.int64)
    settings.epochs, settings.learning_rate = 40, 0.1
    predict = train_linear_head(features, labels, 2, settings, seed=0)
    assert (predict(features) == labels).mean() > 0.95


def test_the_frozen_encoder_is_bit_identical_afterwards(config, settings, digits, model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = Evaluation(config, settings, digits).frozen("ours", model.train())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [row["method"] for row in rows] == ["linear head", "kNN"]
    assert all(0.6 < row["mean"] <= 1 for row in rows)  # ten classes, random features
    assert len(rows[0]["top1"]) == settings.seeds


def test_a_changed_encoder_is_noticed(config, settings, digits, model, monkeypatch):
    def careless(model, pixels, *rest):
        model.train()
        with torch.no_grad():
            return model.features(torch.from_numpy(np.array(pixels)).float() / 255).numpy()

    monkeypatch.setattr(evaluation, "extract_features", careless)
    with pytest.raises(RuntimeError, match="encoder changed"):
        Evaluation(config, settings, digits).frozen("ours", model)


def test_the_digest_sees_buffers_too(model):
    before = state_digest(model.encoder)
    model.encoder.bn1.num_batches_tracked += 1
    assert state_digest(model.encoder) != before


def test_the_whole_test_set_is_scored(config, settings, digits, model, monkeypatch):
    seen = []
    extract = evaluation.extract_features

    def count(model, pixels, *rest):
        seen.append(len(pixels))
        return extract(model, pixels, *rest)

    monkeypatch.setattr(evaluation, "extract_features", count)
    Evaluation(config, settings, digits).frozen("ours", model)
    assert seen[1] == 360
    assert 143 <= seen[0] <= 3 * 143  # the labelled images of all seeds, each once


def test_a_run_is_evaluated_beside_its_baselines_and_recorded(run, config, settings, digits):
    result = evaluate_run(run, config, settings, digits, run.last_checkpoint())
    names = [(row["encoder"], row["method"]) for row in result["rows"]]
    assert names == [
        ("federated SimCLR", "linear head"),
        ("federated SimCLR", "kNN"),
        ("random encoder", "linear head"),
        ("random encoder", "kNN"),
        ("raw pixels", "logistic regression"),
    ]
    # The checkpoint holds the initialization, so both encoders are the same one.
    assert result["rows"][0]["top1"] == result["rows"][2]["top1"]
    assert result["rows"][4]["mean"] == pytest.approx(0.917, abs=0.02)
    assert (result["labelled_images"], result["test_images"], result["round"]) == (143, 360, 3)
    (recorded,) = json.loads(run.results.read_text())
    assert recorded["rows"] == result["rows"]
    assert recorded["protocol"]["epochs"] == 5
    assert {"commit", "versions", "hardware"} <= recorded["measured"].keys()
    assert recorded["precision"] == "float32"


def test_supervised_training_starts_afresh_and_learns(config, settings, digits, model):
    before = state_digest(model)
    settings.seeds, settings.supervised.epochs, settings.supervised.batch_size = 1, 10, 16
    (row,) = Evaluation(config, settings, digits).supervised("labels only", model)
    assert row["method"] == "supervised"
    assert row["mean"] > 0.25  # 90 steps; chance is 0.1
    assert state_digest(model) == before


def test_fine_tuning_changes_a_copy_and_beats_chance(config, settings, digits, model):
    before = state_digest(model)
    settings.seeds, settings.epochs = 1, 20
    (row,) = Evaluation(config, settings, digits).tuned("ours", model)
    assert row["method"] == "fine-tuned"
    assert row["mean"] > 0.5
    assert state_digest(model) == before


@pytest.mark.parametrize("way", ["finetune", "train_supervised"])
def test_whole_networks_train_at_the_size_they_are_scored_at(
    config, settings, digits, model, monkeypatch, way
):
    config.train.view_sizes, config.train.encode_size = [4], 8
    sizes = []

    def look(model, images, labels, num_classes, augmentation, *rest):
        sizes.append(augmentation.output_size)
        return torch.nn.Linear(model.feature_size, num_classes)

    monkeypatch.setattr(evaluation, way, look)
    trial = Evaluation(config, settings, digits)
    (trial.tuned if way == "finetune" else trial.supervised)("ours", model)
    assert sizes == [8] * settings.seeds


def test_a_checkpoint_of_another_architecture_is_refused(run, config, settings, digits):
    other = OmegaConf.merge(config.model, {"encoder": "resnet50"})
    state = build_model(other, config.dataset, 0, CPU).state_dict()
    save_checkpoint(run.checkpoints, Checkpoint(4, state), keep=2)
    with pytest.raises(UserError, match="another architecture than resnet18"):
        evaluate_run(run, config, settings, digits, run.last_checkpoint())
    assert not run.results.exists()


def test_images_without_labels_cannot_be_evaluated(config, settings, digits):
    bare = ImageSet(Images(digits.train.pixels, None), None, [], [], "bare", "", "bare")
    with pytest.raises(UserError, match="no labels"):
        Evaluation(config, settings, bare)


def test_a_checkpoint_is_found_by_run_or_by_file(run, tmp_path):
    newest = run.last_checkpoint()
    by_run = find_checkpoint(load_config("test", [f"run={run.path}"]))
    by_link = find_checkpoint(load_config("test", [f"run={tmp_path / 'latest'}"]))
    by_file = find_checkpoint(load_config("test", [f"checkpoint={newest}"]))
    assert {checkpoint for _, checkpoint in (by_run, by_link, by_file)} == {newest}
    assert {directory.path for directory, _ in (by_run, by_link, by_file)} == {run.path}
    for wrong in (f"run={tmp_path}/none", f"checkpoint={tmp_path}/none.safetensors"):
        with pytest.raises(UserError, match="none"):
            find_checkpoint(load_config("test", [wrong]))


def test_baselines_can_be_left_out(config, settings, model, run, digits):
    settings.baselines = False
    checkpoint = run.last_checkpoint()
    result = evaluate_run(run, config, settings, digits, checkpoint)
    assert {row["encoder"] for row in result["rows"]} == {"federated SimCLR"}
