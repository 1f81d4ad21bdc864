"""Data sets of the hub, from local copies of their files."""

import io
import math
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CPU, open_images
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fedssl.compute import Backend
from fedssl.config.compose import load_config
from fedssl.data.partitions import count_classes
from fedssl.data.sources.base import NO_LABEL
from fedssl.data.sources.hub import HubSource
from fedssl.errors import UserError
from fedssl.evaluation.base import EvaluationData
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


@pytest.fixture
def table(tmp_path, rng, cache_dir):
    """Write splits of pyarrow columns as parquet and open them as a hub data set."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "table"
    folder.mkdir()

    def images(count):
        pixels = rng.integers(0, 256, (count, 9, 9, 3), dtype=np.uint8)
        buffers = [io.BytesIO() for _ in pixels]
        for buffer, each in zip(buffers, pixels, strict=True):
            Image.fromarray(each).save(buffer, "PNG")
        return [{"bytes": buffer.getvalue(), "path": None} for buffer in buffers]

    def open_table(labels, test_labels=None, pictures=None, **settings):
        for split, values in (("train", labels), ("test", test_labels)):
            if values is not None:
                columns = {"image": pictures or images(len(values)), "label": pa.array(values)}
                pq.write_table(pa.table(columns), folder / f"{split}-00000-of-00001.parquet")
        source = HubSource(
            name="own",
            hub_name=None,
            path=str(folder),
            image_column="image",
            label_column="label",
            train_split="train",
            test_split=None if test_labels is None else "test",
            **{"test_fraction": 0.2, **settings},
        )
        return open_images(source, 9, cache_dir)

    return open_table


def test_labels_may_be_texts(table):
    found = table(["dog", "cat", " dog"] * 10, ["cat", "dog"])
    assert found.class_names == ["cat", "dog"]
    assert np.bincount(found.train.labels).tolist() == [10, 20]
    assert found.test.labels.tolist() == [0, 1]


@pytest.mark.parametrize("none", [-1, None, float("nan")])
def test_what_means_no_label_is_never_scored(table, none):
    values = [0, 1] * 10
    if none == none and none is not None:
        found = table([*values, none], [0, none, 1])
    else:
        found = table([*map(float, values), none], [0.0, none, 1.0])
    assert found.train.labels[-1] == NO_LABEL
    assert "1 train images have no label" in found.notes
    assert "1 test images have no label" in found.notes
    backend = Backend(CPU, torch.float32)
    given = {"num_seeds": 1, "seed": 0, "resolution": 9, "views": None, "feature_batch_size": 8}
    data = EvaluationData.of(found, label_fraction=1, backend=backend, **given)
    assert data.test.labels.tolist() == [0, 1]
    assert np.array_equal(data.test.pixels, found.test.pixels[[0, 2]])
    assert data.labelled[0].tolist() == list(range(20))


def test_a_test_split_of_which_nobody_knows_the_labels_leaves_the_test_to_the_others(table):
    found = table([0, 1] * 10, [-1] * 7)
    assert (len(found.train.pixels), len(found.test.pixels)) == (16, 4)
    assert sorted(found.test.labels.tolist()) == [0, 0, 1, 1]
    assert "split 'test' has no labels and is left out" in found.notes


def test_without_any_label_there_are_none(table):
    found = table([-1] * 10)
    assert found.train.labels is None
    assert found.test is None


@pytest.mark.parametrize(
    ("labels", "test_labels", "message"),
    [
        ([0.5, 1.0] * 10, None, "holds no class numbers but fractions"),
        (["a", "b"] * 10, ["a", "c"], "but 'c', which the other split does not have"),
        ([[1], [2]] * 10, None, "holds no class numbers but"),
    ],
)
def test_labels_that_are_none_get_one_line(table, labels, test_labels, message):
    with pytest.raises(UserError, match=message) as error:
        table(labels, test_labels)
    assert "\n" not in str(error.value)


def test_class_numbers_without_names_are_named_by_themselves(table):
    found = table([0, 2] * 10)
    assert found.class_names == ["0", "1", "2"]
    assert count_classes(found, [np.arange(4), np.arange(2)]).shape == (2, 3)


def test_numbers_that_are_no_row_of_classes_are_numbered_without_gaps(table):
    found = table([10**12, 7] * 10)
    assert found.class_names == ["7", str(10**12)]
    assert sorted(set(found.train.labels.tolist())) == [0, 1]


@pytest.mark.parametrize(
    ("labels", "test_labels", "message"),
    [
        ([0, 1] * 10, [0, 7] * 4, "7, which the other split does not have"),
        ([0.0, math.inf] * 10, None, "fractions"),
        (np.array([0, 2**64 - 1] * 10, dtype=np.uint64), None, str(2**64 - 1)),
    ],
)
def test_numbers_that_are_no_classes_get_one_line(table, recwarn, labels, test_labels, message):
    with pytest.raises(UserError, match=message) as error:
        table(labels, test_labels)
    assert "\n" not in str(error.value)
    assert not [each for each in recwarn if each.category is RuntimeWarning]


def test_a_column_without_a_kind_holds_no_labels(table):
    assert table([None] * 10).train.labels is None


def test_rows_without_an_image_are_no_copies(table, rng):
    pixels = rng.integers(0, 256, (20, 9, 9)).tolist()
    found = table([0, 1] * 11, pictures=[*pixels, None, None])
    assert len(found.unreadable) == 2
    assert not [note for note in found.notes if "copies" in note]


def test_what_was_assumed_of_lists_is_said(table, rng):
    deep = rng.integers(0, 4096, (20, 9, 9))
    deep[:, 0, 0] = 4095
    found = table([0, 1] * 10, pictures=deep.tolist())
    assert "12 bits in use (20 images)" in found.notes


def test_what_the_library_refuses_is_one_line(table, tmp_path, capfd):
    with pytest.raises(UserError, match="be loaded"):
        table([])
    (tmp_path / "table" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match="be loaded"):
        table(None)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("channels", ["none", "last", "first"])
def test_images_may_be_nested_lists(table, rng, channels):
    shape = {"none": (20, 9, 9), "last": (20, 9, 9, 3), "first": (20, 3, 9, 9)}[channels]
    pixels = rng.integers(0, 256, shape)
    found = table([0, 1] * 10, pictures=pixels.tolist(), test_fraction=None)
    as_rgb = {
        "none": lambda p: np.stack([p] * 3, axis=1),
        "last": lambda p: p.transpose(0, 3, 1, 2),
        "first": lambda p: p,
    }[channels](pixels)
    assert np.array_equal(found.train.pixels, as_rgb)


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        ([[1, 2, 3]] * 20, "lists of 3 numbers without height and width"),
        (list(range(20)), "neither images nor numbers"),
    ],
)
def test_a_column_without_images_gets_one_line(table, pictures, message):
    with pytest.raises(UserError, match=message):
        table([0, 1] * 10, pictures=pictures)


def test_one_of_several_configurations_is_chosen_by_name(tmp_path, cache_dir, parquet):
    folder = tmp_path / "copy"
    for name in ("small", "large"):
        (folder / name).mkdir()
        shutil.copy(folder / "train-00000-of-00001.parquet", folder / name)
    (folder / "train-00000-of-00001.parquet").unlink()
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files: small/*\n"
        "- config_name: large\n  data_files: large/*\n---\n"
    )
    with pytest.raises(UserError, match=r"'small', 'large'.*dataset\.config_name"):
        open_images(parquet, 10, cache_dir)
    found = open_images(replace(parquet, config_name="large"), 10, cache_dir)
    assert len(found.train.pixels) == 24


def test_exact_copies_stay_on_one_side_of_a_drawn_split(table, rng):
    pixels = rng.integers(0, 256, (20, 9, 9))
    found = table([0, 1] * 20, pictures=[*pixels.tolist(), *pixels.tolist()])
    sides = [{image.tobytes() for image in each.pixels} for each in (found.train, found.test)]
    assert not sides[0] & sides[1]
    assert "20 exact copies stay on the side of their originals" in found.notes


COLUMNS = st.one_of(
    st.lists(st.one_of(st.none(), st.integers(-3, 4)), min_size=1, max_size=30),
    st.lists(st.sampled_from(["", "a", " a", "b", "É", "$0_$1"]), min_size=1, max_size=30),
    st.lists(st.one_of(st.none(), st.floats(-2, 3)), min_size=1, max_size=30),
    st.lists(st.booleans(), min_size=1, max_size=30),
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(COLUMNS, st.one_of(st.none(), st.just([]), COLUMNS))
def test_whatever_a_column_of_labels_holds_there_are_true_numbers_or_a_line(
    table, labels, test_labels
):
    """Of a split without rows, too."""
    test_labels = test_labels or None
    try:
        found = table(labels, test_labels)
    except UserError:
        return
    assert len(found.train.pixels) + (len(found.test.pixels) if found.test else 0) <= len(
        labels
    ) + len(test_labels or [])
    for images in filter(None, (found.train, found.test)):
        if images.labels is not None:
            assert images.labels.min() >= NO_LABEL
            assert images.labels.max() < len(found.class_names)
            assert (images.labels != NO_LABEL).any()
