"""Trials of recipes: the same federation as everywhere, and a test set that stays unseen."""

import json

import numpy as np
import pytest

from benchmarks.accuracy import tune
from fedssl.config.compose import load_config
from utils import open_images

TINY = ["num_clients=2", "num_rounds=2", "precision=float32", "model.stem=imagenet"]
TINY += ["optimizer=sgd", "train.batch_size=8", "train.max_steps=3", "train.round_fractions=[1]"]
TINY += ["eval.epochs=1"]


@pytest.fixture
def trial(tmp_path, monkeypatch):
    """Run a trial as the command line does; give its recorded line."""

    def run(*overrides):
        out = tmp_path / "tuning.jsonl"
        given = [*TINY, f"cache_dir={tmp_path / 'cache'}", *overrides]
        monkeypatch.setattr("sys.argv", ["tune.py", f"--out={out}", *given])
        tune.main()
        return json.loads(out.read_text().splitlines()[-1])

    return run


@pytest.mark.slow
def test_a_trial_is_recorded_and_the_term_of_fedprox_reaches_the_clients(trial):
    free, held = (trial("strategy=fedprox", f"strategy.proximal_mu={mu}") for mu in (0, 1))
    keys = ["overrides", "losses", "images", "train_s", "by_pixels", "measured"]
    assert list(free) == keys
    assert free["images"] == held["images"] == 2 * 2 * 3 * 8  # rounds, clients, steps, batch
    assert len(free["losses"]) == 2
    assert set(free["by_pixels"]["8"]) == {"linear_head", "knn"}
    assert free["losses"] != held["losses"]


def test_the_images_that_are_scored_are_neither_trained_on_nor_labelled(tmp_path):
    config = load_config("config", [f"cache_dir={tmp_path}", "partition=dirichlet"])
    images = open_images(config).train
    parts, labelled, held = tune.split_images(images, config)
    assert len(parts) == config.num_clients
    trained = np.concatenate(parts)
    assert sorted([*trained, *held]) == list(range(len(images.pixels)))
    assert len(held) == 300
    assert not np.isin(np.concatenate(labelled), held).any()
