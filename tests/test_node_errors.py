"""What a node of its own tells the server of its images: how many, never their names."""

import logging
import os
import shutil

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from omegaconf import OmegaConf
from PIL import Image

from client import ClientConfig, load_client, make_client_app
from fedssl.config.compose import load_config
from fedssl.errors import SettingError, UserError
from fedssl.federation.aggregation import arrays_for_strategy
from fedssl.federation.local_grid import LocalGrid
from fedssl.federation.messages import BUFFERS, pack_arrays, pack_tensors, split_state
from utils import build_method

PATIENT = "Meier-Anna"
KINDS = ("query", "train", "evaluate")
COUNT = 12


@pytest.fixture
def folder(tmp_path, rng):
    """Images that are named after people."""
    folder = tmp_path / "clinic-west" / "patients"
    folder.mkdir(parents=True)
    for number in range(COUNT):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{PATIENT}-{number:02}.png")
    return folder


@pytest.fixture
def node(folder, tmp_path):
    """Ask a node with these images; give the replies, or the text of the error that travels."""
    given = ["dataset=imagefolder", "dataset.image_size=8", "train.max_steps=1"]
    place = f"cache_dir={tmp_path}/secret-cache"
    overrides = ["model.stem=imagenet", "precision=float32", "train.batch_size=4", place]

    def ask(kind, data_path=str(folder), **settings):
        changed = [f"{key}={value}" for key, value in settings.items()]
        config = load_config("config", [*given, *overrides, *changed])
        text = OmegaConf.to_yaml(config, resolve=True)
        client = ClientConfig(text, 0, 1, data_path)
        load_client.cache_clear()  # a node starts a process for every message
        grid = LocalGrid(make_client_app(lambda context: client), 1)
        method = build_method(config, torch.device("cpu"))
        names = arrays_for_strategy(method, "parameters")
        arrays, buffers = split_state(method.shared_state(), names)
        request = ConfigRecord({"server-round": 1, BUFFERS: pack_tensors(buffers)})
        content = {} if kind == "query" else {"arrays": pack_arrays(arrays), "config": request}
        try:
            return grid.answer(Message(RecordDict(content), 1, kind), grid.contexts[1])
        except RuntimeError as error:
            return str(error)

    yield ask
    load_client.cache_clear()


def break_all(folder):
    for file in folder.iterdir():
        file.write_bytes(b"no image")


def disguise(folder):
    for file in folder.iterdir():
        file.write_text("<script>")
        file.rename(file.with_suffix(".jpg"))


def empty(folder):
    for file in folder.iterdir():
        file.unlink()


def leave_texts(folder):
    for file in folder.iterdir():
        file.rename(file.with_suffix(".txt"))


def replace_by_file(folder):
    shutil.rmtree(folder)
    folder.write_text("")


def lock(folder):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    folder.chmod(0)


def leave_too_few(folder):
    for file in sorted(folder.iterdir())[3:]:
        file.unlink()


FAULTS = {
    "all broken": (break_all, f"none of its {COUNT} train images can be read; see the node's log"),
    "disguised": (disguise, f"none of its {COUNT} train images can be read; see the node's log"),
    "empty": (empty, "where it looks for images is an empty folder; see the node's log"),
    "no images": (leave_texts, "no image found in its folder (looked for "),
    "vanished": (shutil.rmtree, "its folder of images is not there; see the node's log"),
    "a file": (replace_by_file, "where it looks for images is not a folder; see the node's log"),
    "locked": (lock, "its images can't be read (Permission denied); see the node's log"),
    "too few": (leave_too_few, "a client has 3 images, too few to train on 2 and hold 2 out"),
}


def assert_nothing_names(text, folder, tmp_path):
    """Look for every component of the folder's path, and for what lies in it."""
    own = [*folder.relative_to(tmp_path.parent).parts, PATIENT, "secret-cache", "/"]
    assert not [part for part in own if part in text], text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_server_hears_what_is_wrong_and_no_name(node, folder, tmp_path, caplog, fault, kind):
    spoil, expected = FAULTS[fault]
    spoil(folder)
    with caplog.at_level(logging.INFO, "flwr"):
        told = node(kind)
    assert told.startswith(f"partition 0: {expected}")
    assert_nothing_names(told, folder, tmp_path)
    if "log" in expected:
        assert str(folder) in caplog.text
    if "broken" in fault:
        assert f"{PATIENT}-00.png" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_that_cant_be_written_stays_unnamed(node, folder, tmp_path, caplog, kind):
    (tmp_path / "secret-cache").write_text("")
    with caplog.at_level(logging.INFO, "flwr"):
        told = node(kind)
    assert told == "partition 0: its cache can't be written (File exists); see the node's log"
    assert "secret-cache" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "error",
    [OSError(5, "bad disk", f"/data/{PATIENT}.png"), ValueError(PATIENT), UserError(PATIENT)],
    ids=repr,
)
def test_of_an_unforeseen_error_only_the_type_travels(node, monkeypatch, caplog, error, kind):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("client.open_client_images", fail)
    with caplog.at_level(logging.INFO, "flwr"):
        told = node(kind)
    of_ours = isinstance(error, UserError)
    wanted = "a setting does not suit it" if of_ours else type(error).__name__
    assert told == f"partition 0: {wanted}; see the node's log"
    assert PATIENT in caplog.text
    assert ("Traceback" in caplog.text) != of_ours


def test_an_error_before_the_node_is_known_travels_as_little(caplog):
    def identify(context):
        raise ValueError(PATIENT)

    grid = LocalGrid(make_client_app(identify), 1)
    with caplog.at_level(logging.INFO, "flwr"), pytest.raises(RuntimeError) as error:
        grid.answer(Message(RecordDict(), 1, "query"), grid.contexts[1])
    assert str(error.value) == "ValueError; see the node's log"
    assert PATIENT in caplog.text


def test_a_diverged_training_and_wrong_settings_are_told_in_full(node, monkeypatch):
    def diverge(*arguments, **options):
        raise FloatingPointError("the training loss became nan; lower learning_rate")

    monkeypatch.setattr("client.local_train", diverge)
    assert node("train") == "partition 0: the training loss became nan; lower learning_rate"
    assert SettingError("num_rounds=0: no").public == "num_rounds=0: no"


def test_one_broken_image_is_named_in_the_log_and_counted_in_the_round(node, folder, caplog):
    (folder / f"{PATIENT}-07.png").write_text("broken")
    with caplog.at_level(logging.INFO, "flwr"):
        assert node("query").content["metrics"] == {"partition-id": 0}
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    name = folder / f"{PATIENT}-07.png"
    assert lines == [f"1 of {COUNT} images can't be read and are left out: {name}"]
    metrics = node("train").content["metrics"]
    assert (metrics["unreadable-images"], metrics["num-examples"]) == (1, COUNT - 1 - 2)


def test_whole_images_count_none_as_unreadable(node):
    assert node("train").content["metrics"]["unreadable-images"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_node_takes_its_share_of_the_cores_at_every_message(node, monkeypatch, caplog, kind):
    taken = []
    monkeypatch.setattr("torch.set_num_threads", taken.append)
    with caplog.at_level(logging.INFO, "flwr"):
        node(kind)
        assert len(taken) == 1
        node(kind, num_cpus=1)  # the run's word counts
    assert taken[1:] == [1]
    assert len([line for line in caplog.messages if "takes" in line]) == 1
