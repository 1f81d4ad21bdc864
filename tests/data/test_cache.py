import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import utils
from fedssl.config.compose import load_config
from fedssl.data.cache import open_image_set
from fedssl.data.decoding import decode
from fedssl.data.sources import folder as sources
from fedssl.errors import UserError
from fedssl.seeding import derive_seed


def open_set(cache_dir, *overrides, seed=0):
    return open_image_set(load_config("config", overrides).dataset, str(cache_dir), seed)


# --- sources ------------------------------------------------------------------


def test_the_digits_are_split_by_the_seed_with_the_class_shares_kept(cache_dir, digits):
    assert (len(digits.train.pixels), len(digits.test.pixels)) == (1437, 360)
    assert digits.train.pixels.shape[1:] == (3, 8, 8)
    shares = [np.bincount(part.labels) / len(part.labels) for part in (digits.train, digits.test)]
    np.testing.assert_allclose(*shares, atol=0.005)
    other = open_set(cache_dir, seed=1)
    assert not np.array_equal(other.test.labels, digits.test.labels)
    whole = [np.concatenate([s.train.pixels, s.test.pixels]) for s in (digits, other)]
    rows = [np.sort(w.reshape(len(w), -1).view("S192").ravel()) for w in whole]
    assert np.array_equal(*rows)  # the same 1,797 images, split otherwise


def test_cifar10_from_a_local_copy_is_decoded_once(cifar10, cache_dir):
    overrides = ["dataset=cifar10", f"dataset.path={cifar10}"]
    first = open_set(cache_dir, *overrides)
    assert (len(first.train.pixels), len(first.test.pixels)) == (50_000, 10_000)
    assert np.bincount(first.train.labels).tolist() == [5_000] * 10
    assert first.class_names[0] == "airplane"
    began = time.perf_counter()
    again = open_set(cache_dir, *overrides)
    assert time.perf_counter() - began < 1
    assert isinstance(again.train.pixels, np.memmap)
    assert np.array_equal(again.test.pixels, first.test.pixels)


def test_the_cache_is_opened_without_its_source(cache_dir, digits, monkeypatch):
    monkeypatch.setattr(utils, "_read_source", None)
    assert np.array_equal(open_set(cache_dir).train.pixels, digits.train.pixels)


def test_without_a_network_the_hub_says_so_within_seconds(cache_dir, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("HF_HUB_CACHE", f"{cache_dir}/no-hub")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    began = time.perf_counter()
    with pytest.raises(UserError, match=r"can't be reached.*dataset\.path=DIR"):
        open_set(cache_dir, "dataset=cifar10")
    assert time.perf_counter() - began < 10


@pytest.fixture
def parquet(tmp_path, rng):
    """A copy of a hub data set: 30 training images in a parquet file, no test split."""
    import datasets

    pixels = rng.integers(0, 256, (30, 20, 20, 3), dtype=np.uint8)
    columns = {"picture": [Image.fromarray(p) for p in pixels], "kind": [0, 1, 2] * 10}
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b", "c"])}
    )
    (tmp_path / "copy").mkdir()
    table = datasets.Dataset.from_dict(columns, features=features)
    table.to_parquet(str(tmp_path / "copy" / "train-00000-of-00001.parquet"))
    return tmp_path / "copy"


def test_any_hub_data_set_can_be_read_from_a_copy(parquet, cache_dir):
    common = ["dataset=hub", f"dataset.path={parquet}", "dataset.image_column=picture"]
    common += ["dataset.test_split=null", "dataset.image_size=10"]
    labelled = [*common, "dataset.label_column=kind", "dataset.test_fraction=0.2"]
    found = open_set(cache_dir, *labelled)
    assert found.class_names == ["a", "b", "c"]
    assert np.bincount(found.test.labels).tolist() == [2, 2, 2]
    assert found.train.pixels.shape == (24, 3, 10, 10)
    bare = open_set(cache_dir, *common, "dataset.label_column=null")
    assert bare.train.labels is None
    assert len(bare.train.pixels) == 30


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataset.image_column=image", "no column 'image', it has 'picture', 'kind'"),
        ("dataset.label_column=label", "no column 'label'"),
        ("dataset.train_split=training", "no split 'training', it has 'train'"),
        ("dataset.test_split=test", "no split 'test', it has 'train'"),
    ],
)
def test_a_wrong_column_or_split_names_those_there_are(parquet, cache_dir, override, message):
    right = ["dataset.image_column=picture", "dataset.label_column=kind"]
    right += ["dataset.test_split=null", "dataset.test_fraction=0.2"]
    given = ["dataset=hub", f"dataset.path={parquet}", *right, override]
    with pytest.raises(UserError) as error:
        open_set(cache_dir, *given)
    assert message in str(error.value)


@pytest.fixture
def folder(tmp_path, rng):
    """Class folders with images of many modes and sizes, 6 of each class."""
    root = tmp_path / "images"
    for number, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for index, mode in enumerate(("RGB", "L", "RGBA", "P", "CMYK", "I;16")):
            size = (20 + 10 * index, 30)
            if mode == "I;16":
                image = Image.fromarray(rng.integers(0, 2**16, size[::-1], dtype=np.uint16))
            else:
                pixels = rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
                image = Image.fromarray(pixels).convert(mode)
            suffix = "jpg" if mode == "CMYK" else "png"
            image.save(root / name / f"{number}{index}.{suffix}")
    return root


def test_class_folders_of_any_mode_and_size(folder, cache_dir):
    path = f"dataset.path={folder}"
    found = open_set(cache_dir, "dataset=imagefolder", path, "dataset.image_size=16")
    assert found.class_names == ["cat", "dog"]
    assert found.train.pixels.shape[1:] == (3, 16, 16)
    assert len(found.train.pixels) + len(found.test.pixels) == 12
    assert found.unreadable == []
    assert set(found.test.labels) == {0, 1}


def test_labels_can_be_ignored(folder, cache_dir):
    overrides = ["dataset=imagefolder", f"dataset.path={folder}", "dataset.labels=false"]
    found = open_set(cache_dir, *overrides)
    assert found.train.labels is None
    assert found.test is None
    assert len(found.train.pixels) == 12


def test_loose_images_have_no_labels(folder, cache_dir):
    for file in folder.glob("*/*"):
        file.rename(folder / file.name)
    found = open_set(cache_dir, "dataset=imagefolder", f"dataset.path={folder}")
    assert found.train.labels is None
    assert len(found.train.pixels) == 12


def test_train_and_test_folders_are_kept_apart(folder, cache_dir):
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / part / name).mkdir(parents=True)
    for file in folder.glob("[cd]*/*"):
        part = "test" if file.stem.endswith("1") else "train"
        file.rename(folder / part / file.parent.name / file.name)
    for name in ("cat", "dog"):
        (folder / name).rmdir()
    found = open_set(cache_dir, "dataset=imagefolder", f"dataset.path={folder}")
    assert (len(found.train.pixels), len(found.test.pixels)) == (10, 2)


def test_a_changed_folder_is_read_again(folder, cache_dir):
    overrides = ["dataset=imagefolder", f"dataset.path={folder}", "dataset.labels=false"]
    first = open_set(cache_dir, *overrides)
    (folder / "cat" / "00.png").unlink()
    assert open_set(cache_dir, *overrides).key != first.key


def test_unreadable_files_are_counted_and_named(folder, cache_dir):
    whole = (folder / "cat" / "00.png").read_bytes()
    (folder / "cat" / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "cat" / "text.jpg").write_text("not an image")
    (folder / "dog" / "empty.png").touch()
    found = open_set(
        cache_dir, "dataset=imagefolder", f"dataset.path={folder}", "dataset.labels=false"
    )
    names = [os.path.basename(name) for name in found.unreadable]
    assert names == ["text.jpg", "truncated.png", "empty.png"]
    assert len(found.train.pixels) == 12


def test_labels_stay_with_their_images_when_files_are_unreadable(tmp_path, cache_dir):
    for name, gray in (("black", 0), ("white", 255)):
        (tmp_path / name).mkdir()
        for index in range(10):
            Image.new("L", (9, 9), gray).save(tmp_path / name / f"{index}.png")
        (tmp_path / name / "4.png").write_text("broken")
    found = open_set(cache_dir, "dataset=imagefolder", f"dataset.path={tmp_path}")
    for part in (found.train, found.test):
        assert np.array_equal(part.pixels.mean(axis=(1, 2, 3)) > 127, part.labels == 1)


@pytest.mark.parametrize("content", ["nothing", "no folder", "no image", "a file", "only broken"])
def test_a_folder_without_images_gets_one_line(tmp_path, content):
    path = tmp_path / "data"
    if content == "a file":
        path.touch()
    elif content != "no folder":
        path.mkdir()
    if content == "no image":
        (path / "notes.txt").touch()
    if content == "only broken":
        (path / "a.png").touch()
        (path / "b.png").touch()
    with pytest.raises(UserError, match=str(path)) as error:
        open_set(tmp_path / "cache", "dataset=imagefolder", f"dataset.path={path}")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("cache/*"))


def test_a_cache_that_cannot_be_written_gets_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cache_dir=.*can't be written"):
        open_set(tmp_path / "file" / "below")


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(utils, "_write_pixels", stop)
    with pytest.raises(KeyboardInterrupt):
        open_set(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_two_builders_of_the_same_cache_agree(tmp_path, monkeypatch):
    whole = sources.digits

    def slow(*arguments):
        monkeypatch.setattr(sources, "digits", whole)
        open_set(tmp_path)  # another process is faster
        return whole(*arguments)

    monkeypatch.setattr(sources, "digits", slow)
    assert len(open_set(tmp_path).train.pixels) == 1437
    assert len(list(tmp_path.iterdir())) == 1


def test_images_of_the_right_size_keep_their_pixels(rng):
    pixels = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
    assert np.array_equal(decode(pixels, 12), pixels.transpose(2, 0, 1))


def test_transparent_pixels_become_white_and_16_bits_keep_the_upper_8():
    clear = np.zeros((4, 4, 4), dtype=np.uint8)
    assert (decode(clear, 4) == 255).all()
    deep = np.full((4, 4), 0x4321, dtype=np.uint16)
    assert (decode(deep, 4) == 0x43).all()


# --- seeds --------------------------------------------


def test_seeds_depend_on_the_purpose_and_fit_a_generator():
    seeds = {derive_seed(0, "train", r, p) for r in range(50) for p in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "train", 1, 2) == derive_seed(0, "train", 1, 2)
    assert json.dumps(derive_seed(0, "a")) != json.dumps(derive_seed(0, "b"))


def test_freed_memory_goes_back_to_the_system():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    blocks = [b"x" * 65536 + bytes([n % 256]) for n in range(3000)]  # below malloc's own mappings
    last = blocks[-1]  # keeps the heap from shrinking by itself
    full = resident()
    blocks.clear()
    utils.release_memory()
    assert full - resident() > 150e6
    assert len(last) == 65537
