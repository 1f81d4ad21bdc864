"""test.py: which run, which protocol, and what is left in results.json."""

import json

import pytest
import torch
from conftest import create_run
from omegaconf import OmegaConf

from fedssl.compute import choose_backend
from fedssl.config.compose import load_config
from fedssl.config.evaluation import follow_run
from fedssl.errors import UserError
from fedssl.evaluation.supervised import SupervisedTraining
from fedssl.runs.checkpoints import Checkpoint, save_checkpoint
from test import find_checkpoint
from utils import build_method, evaluate_run, open_evaluation

pytestmark = pytest.mark.usefixtures("narrow")

CPU = torch.device("cpu")


@pytest.fixture
def settings():
    return load_config("test", ["epochs=5", "learning_rate=0.03", "weight_decay=0.1"])


@pytest.fixture
def run(tmp_path, config):
    directory = create_run(tmp_path / "run", config)
    state = build_method(config, CPU).state_dict()
    save_checkpoint(directory.checkpoints, Checkpoint(3, state), keep=1)
    return directory


def test_a_run_is_evaluated_beside_its_baselines_and_recorded(run, config, settings, digits):
    result = evaluate_run(run, config, settings, digits, run.last_checkpoint())
    assert [row.encoder for row in result.rows[::3]] == [
        "federated SimCLR",
        "random encoder",
        "raw pixels",
    ]
    # The checkpoint holds the initialization, so both encoders are the same one.
    assert result.rows[0].top1 == result.rows[3].top1
    assert (result.labelled_images, result.test_images, result.round) == (143, 360, 3)
    (recorded,) = json.loads(run.results.read_text())
    assert recorded == result.to_json()
    assert recorded["protocol"]["epochs"] == 5
    assert {"commit", "versions", "hardware"} <= recorded["measured"].keys()
    assert (recorded["mode"], recorded["precision"]) == ("linear", "float32")


def test_baselines_can_be_left_out(config, settings, run, digits):
    settings.baselines = False
    result = evaluate_run(run, config, settings, digits, run.last_checkpoint())
    assert {row.encoder for row in result.rows} == {"federated SimCLR"}


@pytest.mark.parametrize("protocol", ["linear", "finetune", "supervised"])
def test_the_protocol_is_that_of_the_configuration(config, digits, protocol):
    config.train.train_resolutions, config.train.eval_resolution = [4], 6
    chosen = load_config("config", [f"eval={protocol}", "eval.seeds=2", "eval.epochs=7"]).eval
    backend = choose_backend("float32")
    evaluation, data = open_evaluation(chosen, config, digits, 1, backend)
    assert (evaluation.mode, evaluation.seeds, evaluation.epochs) == (protocol, 2, 7)
    assert (data.resolution, data.views.output_size, len(data.seeds)) == (6, 6, 2)


def test_training_from_scratch_has_its_own_values(config, digits):
    settings = load_config("test", ["eval=supervised"])
    follow_run(settings, config)
    evaluation, _ = open_evaluation(settings, config, digits, 1, choose_backend("float32"))
    assert isinstance(evaluation, SupervisedTraining)
    assert (evaluation.epochs, evaluation.batch_size) == (60, 64)
    assert (evaluation.learning_rate, evaluation.weight_decay) == (0.02, 5e-4)


def test_a_checkpoint_of_another_architecture_is_refused(run, config, settings, digits):
    other = OmegaConf.merge(config, {"model": {"encoder": "resnet50"}})
    state = build_method(other, CPU).state_dict()
    save_checkpoint(run.checkpoints, Checkpoint(4, state), keep=2)
    with pytest.raises(UserError, match="another architecture than resnet18"):
        evaluate_run(run, config, settings, digits, run.last_checkpoint())
    assert not run.results.exists()


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
