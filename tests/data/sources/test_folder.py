"""Folders of images of many modes and sizes."""

from dataclasses import replace

import pytest
from conftest import open_images

from fedssl.data.sources.folder import FolderSource, own_folder
from fedssl.errors import UserError


@pytest.fixture
def labelled(pets):
    return FolderSource(name="pets", path=str(pets), labels=True, test_fraction=0.2)


def test_class_folders_of_any_mode_and_size(labelled, cache_dir):
    found = open_images(labelled, 16, cache_dir)
    assert found.class_names == ["cat", "dog"]
    assert found.train.pixels.shape[1:] == (3, 16, 16)
    assert len(found.train.pixels) + len(found.test.pixels) == 12
    assert found.unreadable == []
    assert set(found.test.labels) == {0, 1}
    assert found.labelled


def test_labels_can_be_ignored(labelled, cache_dir):
    found = open_images(replace(labelled, labels=False), 16, cache_dir)
    assert found.train.labels is None
    assert found.test is None
    assert not found.labelled
    assert len(found.train.pixels) == 12


def test_loose_images_have_no_labels(labelled, pets, cache_dir):
    for file in pets.glob("*/*"):
        file.rename(pets / file.name)
    found = open_images(labelled, 16, cache_dir)
    assert found.train.labels is None
    assert len(found.train.pixels) == 12


def move_into_splits(pets, odd=""):
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (pets / part / (name + odd * (part == "test"))).mkdir(parents=True)
    for file in pets.glob("[cd]*/*"):
        part, name = ("test", file.parent.name + odd), ("train", file.parent.name)
        file.rename(pets.joinpath(*(part if file.stem.endswith("1") else name), file.name))
    for name in ("cat", "dog"):
        (pets / name).rmdir()


def test_train_and_test_folders_are_kept_apart(labelled, pets, cache_dir):
    move_into_splits(pets)
    found = open_images(labelled, 16, cache_dir)
    assert (len(found.train.pixels), len(found.test.pixels)) == (10, 2)


def test_test_folders_with_other_classes_are_refused(labelled, pets, cache_dir):
    move_into_splits(pets, odd="s")
    with pytest.raises(UserError, match="hold different classes"):
        open_images(labelled, 16, cache_dir)


def test_a_clients_own_folder_is_for_training_alone(pets, cache_dir):
    found = open_images(own_folder(str(pets), "pets"), 16, cache_dir)
    assert (len(found.train.pixels), found.train.labels, found.test) == (12, None, None)
    assert own_folder(str(pets), "pets").fingerprint(0) == own_folder(
        str(pets), "pets"
    ).fingerprint(1)


def test_without_a_folder_the_images_are_elsewhere(labelled):
    nowhere = replace(labelled, path=None)
    assert (labelled.is_here, nowhere.is_here) == (True, False)
    with pytest.raises(UserError, match=r"add dataset\.path=DIR"):
        nowhere.check()


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
    source = FolderSource(name="imagefolder", path=str(path), labels=True, test_fraction=0.2)
    with pytest.raises(UserError, match=str(path)) as error:
        open_images(source, 16, tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("cache/*"))
