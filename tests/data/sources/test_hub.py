"""Data sets of the hub, from local copies of their files."""

import time
from dataclasses import replace

import numpy as np
import pytest
from conftest import open_images
from PIL import Image

from fedssl.config.compose import load_config
from fedssl.data.sources.hub import HubSource
from fedssl.errors import UserError
from utils import open_source


def cifar10_source(path=None):
    return replace(open_source(load_config("config", ["dataset=cifar10"]).dataset), path=path)


@pytest.mark.slow
def test_cifar10_from_a_local_copy_is_decoded_once(cifar10, cache_dir):
    source = cifar10_source(str(cifar10))
    first = open_images(source, 32, cache_dir)
    assert (len(first.train.pixels), len(first.test.pixels)) == (50_000, 10_000)
    assert np.bincount(first.train.labels).tolist() == [5_000] * 10
    assert first.class_names[0] == "airplane"
    began = time.perf_counter()
    again = open_images(source, 32, cache_dir, seed=1)
    assert time.perf_counter() - began < 1
    assert isinstance(again.train.pixels, np.memmap)
    assert np.array_equal(again.test.pixels, first.test.pixels)


def test_without_a_network_the_hub_says_so_within_seconds(cache_dir, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("HF_HUB_CACHE", f"{cache_dir}/no-hub")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    began = time.perf_counter()
    with pytest.raises(UserError, match=r"can't be reached.*dataset\.path=DIR"):
        open_images(cifar10_source(), 32, cache_dir)
    assert time.perf_counter() - began < 10


@pytest.fixture
def parquet(tmp_path, rng):
    """A hub data set as 30 training images in a parquet file, no test split."""
    import datasets

    pixels = rng.integers(0, 256, (30, 20, 20, 3), dtype=np.uint8)
    columns = {"picture": [Image.fromarray(p) for p in pixels], "kind": [0, 1, 2] * 10}
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b", "c"])}
    )
    (tmp_path / "copy").mkdir()
    table = datasets.Dataset.from_dict(columns, features=features)
    table.to_parquet(str(tmp_path / "copy" / "train-00000-of-00001.parquet"))
    return HubSource(
        name="owner/pets",
        hub_name="owner/pets",
        path=str(tmp_path / "copy"),
        image_column="picture",
        label_column="kind",
        train_split="train",
        test_split=None,
        test_fraction=0.2,
    )


def test_any_hub_data_set_can_be_read_from_a_copy(parquet, cache_dir):
    found = open_images(parquet, 10, cache_dir)
    assert found.class_names == ["a", "b", "c"]
    assert np.bincount(found.test.labels).tolist() == [2, 2, 2]
    assert found.train.pixels.shape == (24, 3, 10, 10)
    assert found.key.startswith("owner--pets-10px-")
    bare = open_images(replace(parquet, label_column=None), 10, cache_dir)
    assert bare.train.labels is None
    assert len(bare.train.pixels) == 30
    whole = open_images(replace(parquet, test_fraction=None), 10, cache_dir)
    assert (len(whole.train.pixels), whole.test) == (30, None)


def test_a_copy_needs_no_name(parquet, cache_dir):
    found = open_images(replace(parquet, name=None, hub_name=None), 10, cache_dir)
    assert found.name == "local"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_column": "image"}, "no column 'image', it has 'picture', 'kind'"),
        ({"label_column": "label"}, "no column 'label'"),
        ({"label_column": "picture"}, "holds no class numbers"),
        ({"train_split": "training"}, "no split 'training', it has 'train'"),
        ({"test_split": "test"}, "no split 'test', it has 'train'"),
        ({"path": None, "name": None, "hub_name": None}, "add dataset.name=OWNER/NAME"),
        ({"path": "/none"}, "no such folder"),
    ],
)
def test_wrong_settings_name_what_there_is(parquet, cache_dir, changes, message):
    with pytest.raises(UserError) as error:
        open_images(replace(parquet, **changes), 10, cache_dir)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_seed_counts_only_where_it_splits(parquet):
    assert parquet.splits_by_seed
    for changes in ({"test_split": "test"}, {"label_column": None}, {"test_fraction": None}):
        assert not replace(parquet, **changes).splits_by_seed
