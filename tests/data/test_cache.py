"""Decoding into the cache, whatever the source."""

import os
from dataclasses import dataclass, replace

import numpy as np
import pytest
from conftest import open_images
from PIL import Image

from fedssl.data import cache
from fedssl.data.cache import find_damage
from fedssl.data.sources.base import Encoded, Source, Split, Splits
from fedssl.data.sources.digits import DigitsSource
from fedssl.data.sources.folder import FolderSource, own_folder
from fedssl.errors import UserError
from utils import open_source

DIGITS = DigitsSource(name="digits", test_fraction=0.2)


@dataclass(frozen=True, kw_only=True)
class GrayLevels(Source):
    """What an extension is: here every image is of one gray."""

    levels: int

    def read(self, seed, scratch):
        grays = np.random.default_rng(seed).permutation(self.levels)

        def images():
            return (Encoded(f"gray {gray}", np.full((5, 5), gray, np.uint8)) for gray in grays)

        return Splits({"train": Split(self.levels, images, None)}, [])


def test_a_source_that_nobody_knows_goes_through_the_cache(tmp_path):
    target = f"{GrayLevels.__module__}.GrayLevels"
    section = {"_target_": target, "name": "my/grays", "levels": 7, "image_size": 3}
    source = open_source(section)
    found = open_images(source, 3, tmp_path)
    assert (found.name, found.labelled, found.train.pixels.shape) == (
        "my/grays",
        False,
        (7, 3, 3, 3),
    )
    assert sorted(found.train.pixels[:, 0, 0, 0]) == list(range(7))
    keys = {open_images(source, 3, tmp_path).key, found.key}
    assert len(keys) == 1
    keys |= {open_images(source, 3, tmp_path, seed=1).key, open_images(source, 4, tmp_path).key}
    keys |= {open_images(replace(source, levels=8), 3, tmp_path).key}
    assert len(keys) == 4
    assert {file.name for file in tmp_path.iterdir()} == keys


def test_the_cache_is_opened_without_its_source(cache_dir, digits, monkeypatch):
    monkeypatch.setattr(DigitsSource, "read", None)
    assert np.array_equal(open_images(DIGITS, 8, cache_dir).train.pixels, digits.train.pixels)


def test_a_damaged_entry_is_built_again(tmp_path):
    source = GrayLevels(name="grays", levels=7)
    entry = tmp_path / open_images(source, 3, tmp_path).key
    whole = (entry / "train.pixels").read_bytes()
    (entry / "train.pixels").write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert find_damage(entry) == "train.pixels differs from its checksum"
    said = []
    open_images(source, 3, tmp_path, report=said.append)
    assert "is built again" in said[0]
    assert (entry / "train.pixels").read_bytes() == whole
    assert find_damage(entry) is None


def test_a_changed_folder_is_read_again(pets, cache_dir):
    source = own_folder(str(pets), "pets")
    first = open_images(source, 16, cache_dir)
    (pets / "cat" / "00.png").unlink()
    assert open_images(source, 16, cache_dir).key != first.key


def test_unreadable_files_are_counted_and_named(pets, cache_dir):
    whole = (pets / "cat" / "00.png").read_bytes()
    (pets / "cat" / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (pets / "cat" / "text.jpg").write_text("not an image")
    (pets / "dog" / "empty.png").touch()
    (pets / "dog" / "link.png").symlink_to("nothing")
    found = open_images(own_folder(str(pets), "pets"), 16, cache_dir)
    names = [os.path.basename(name) for name in found.unreadable]
    assert names == ["text.jpg", "truncated.png", "empty.png", "link.png"]
    assert len(found.train.pixels) == 12


def test_names_that_are_no_text_do_no_harm(pets, cache_dir):
    (pets / "cat" / "00.png").rename(os.fsdecode(os.fsencode(pets) + b"/cat/\xff.png"))
    assert len(open_images(own_folder(str(pets), "pets"), 16, cache_dir).train.pixels) == 12


def test_labels_stay_with_their_images_when_files_are_unreadable(tmp_path, cache_dir):
    for name, gray in (("black", 0), ("white", 255)):
        (tmp_path / name).mkdir()
        for index in range(10):
            Image.new("L", (9, 9), gray).save(tmp_path / name / f"{index}.png")
        (tmp_path / name / "4.png").write_text("broken")
    source = FolderSource(name="imagefolder", path=str(tmp_path), labels=True, test_fraction=0.2)
    found = open_images(source, 64, cache_dir)
    for part in (found.train, found.test):
        assert np.array_equal(part.pixels.mean(axis=(1, 2, 3)) > 127, part.labels == 1)


def test_a_cache_that_cannot_be_written_gets_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cache_dir=.*can't be written"):
        open_images(DIGITS, 8, tmp_path / "file" / "below")


def test_a_source_that_cannot_be_read_is_not_taken_for_the_cache(tmp_path, monkeypatch):
    def vanish(self, seed, scratch):
        return open(tmp_path / "gone")

    monkeypatch.setattr(GrayLevels, "read", vanish)
    with pytest.raises(UserError, match=r"dataset\.name=grays: can't be read"):
        open_images(GrayLevels(name="grays", levels=7), 3, tmp_path / "cache")


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "_write_pixels", stop)
    with pytest.raises(KeyboardInterrupt):
        open_images(DIGITS, 8, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_two_builders_of_the_same_cache_agree(tmp_path, monkeypatch):
    whole = DigitsSource.read

    def slow(*arguments):
        monkeypatch.setattr(DigitsSource, "read", whole)
        open_images(DIGITS, 8, tmp_path)  # another process is faster
        return whole(*arguments)

    monkeypatch.setattr(DigitsSource, "read", slow)
    assert len(open_images(DIGITS, 8, tmp_path).train.pixels) == 1437
    assert len(list(tmp_path.iterdir())) == 1
