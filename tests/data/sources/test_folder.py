"""Folders of images of many modes and sizes."""

import os
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import CPU, open_images
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fedssl.compute import Backend
from fedssl.data.sources.base import NO_LABEL
from fedssl.data.sources.folder import FolderSource, find_images, own_folder
from fedssl.errors import UserError, name_some
from fedssl.evaluation.base import EvaluationData


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


def place(root, *names):
    """Write an image of its own colour to each place below a folder."""
    for number, name in enumerate(names):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        colour = (number % 7 * 30, number // 7 % 8 * 30, number // 56 * 30)
        Image.new("RGB", (9, 9), colour).save(file, "PNG")


def classes_of(*folders, count=10):
    return [f"{folder}/{number}.png" for folder in folders for number in range(count)]


@pytest.fixture
def read(tmp_path, cache_dir):
    def open_folder(**settings):
        given = {"name": "own", "path": str(tmp_path / "own"), "labels": True}
        source = FolderSource(**{**given, "test_fraction": 0.2, **settings})
        return open_images(source, 8, cache_dir)

    (tmp_path / "own").mkdir()
    return open_folder


@pytest.mark.parametrize("train", ["train", "Train", "TRAINING"])
@pytest.mark.parametrize("test", ["test", "Testing", "val", "VALID"])
def test_split_folders_are_found_whatever_their_case(read, tmp_path, train, test):
    root = tmp_path / "own"
    place(root, *classes_of(f"{train}/cat", f"{train}/dog"))
    place(root, *classes_of(f"{test}/cat", f"{test}/dog", count=3))
    found = read()
    assert (len(found.train.pixels), len(found.test.pixels)) == (20, 6)
    assert found.class_names == ["cat", "dog"]
    assert f"{train}/ is for training" in found.notes
    assert f"{test}/ for the test" in found.notes


def test_what_lies_beside_the_splits_is_left_out_and_named(read, tmp_path):
    root = tmp_path / "own"
    place(root, *classes_of("train/a", "train/b", "test/a", "test/b", "val/a", "extra"))
    found = read()
    assert (len(found.train.pixels), len(found.test.pixels)) == (20, 20)
    assert "extra/, val/ left out" in found.notes


def test_a_class_may_be_called_train(read, tmp_path):
    place(tmp_path / "own", *classes_of("bus", "plane", "train"))
    assert read().class_names == ["bus", "plane", "train"]


def test_a_test_folder_without_labels_leaves_the_test_to_the_labelled_part(read, tmp_path):
    """As in a competition."""
    place(tmp_path / "own", *classes_of("train/cat", "train/dog"), *classes_of("test", count=4))
    for fraction, kept in ((0.2, 4), (None, 4), (0.5, 10)):
        found = read(test_fraction=fraction)
        assert (len(found.train.pixels), len(found.test.pixels)) == (20 - kept, kept)
        assert "test/ holds 4 images without labels and is left out" in found.notes
        assert f"{kept} labelled images are kept for the test" in found.notes


def test_an_empty_test_folder_is_said(read, tmp_path):
    place(tmp_path / "own", *classes_of("train/cat", "train/dog"))
    (tmp_path / "own" / "test").mkdir()
    found = read()
    assert len(found.test.pixels) == 4
    assert "test/ holds no images and is left out" in found.notes


def test_stray_images_have_no_label_and_the_others_keep_theirs(read, tmp_path):
    place(tmp_path / "own", "stray.png", *classes_of("cat", "dog"))
    found = read()
    assert found.class_names == ["cat", "dog"]
    labels = [*found.train.labels.tolist(), *found.test.labels.tolist()]
    assert sorted(labels) == [NO_LABEL, *[0] * 10, *[1] * 10]
    assert NO_LABEL not in found.test.labels
    assert "1 images outside of the class folders have no label" in found.notes
    data = evaluation_data(found, 0.5)
    assert all(NO_LABEL not in found.train.labels[rows] for rows in data.labelled)


def evaluation_data(found, fraction):
    given = {"num_seeds": 2, "seed": 0, "resolution": 8, "views": None, "feature_batch_size": 8}
    backend = Backend(CPU, torch.float32)
    return EvaluationData.of(found, label_fraction=fraction, backend=backend, **given)


def test_system_files_are_no_images_and_no_classes(read, tmp_path):
    root = tmp_path / "own"
    place(root, *classes_of("cat", "dog"), "__MACOSX/cat/0.png", ".ipynb_checkpoints/0.png")
    for name in ("cat/._0.png", "cat/.DS_Store", "Thumbs.db", "dog/notes.txt", "a.heic"):
        (root / name).write_bytes(b"no image")
    found = read()
    assert found.class_names == ["cat", "dog"]
    assert found.unreadable == []
    assert "left out: 1 .heic, 1 .txt" in found.notes


@pytest.mark.parametrize("ending", ["gif", "jfif", "avif", "jpe", "jp2", "pbm", "WebP"])
def test_images_of_every_usual_ending_are_found(read, tmp_path, ending):
    place(tmp_path / "own", *(f"{number}.{ending}" for number in range(3)))
    assert len(read().train.pixels) == 3


def test_links_to_nothing_and_to_themselves_are_counted_and_folders_entered_once(read, tmp_path):
    root = tmp_path / "own"
    place(root, *classes_of("a/deep", "b/deep"))
    (root / "a" / "gone.png").symlink_to(root / "nowhere.png")
    (root / "a" / "self.png").symlink_to(root / "a" / "self.png")
    (root / "a" / "notes").symlink_to(root / "nowhere")
    (root / "a" / "deep" / "up").symlink_to(root)
    found = read()
    assert len(found.train.pixels) + len(found.test.pixels) == 20
    assert "left out: 1 links to nothing" in found.notes
    assert [os.path.basename(name) for name in found.unreadable] == ["gone.png", "self.png"]


def test_exact_copies_stay_on_one_side_of_the_split(read, tmp_path):
    root = tmp_path / "own"
    place(root, *classes_of("cat", "dog", count=20))
    for number in range(10):
        shutil.copy(root / f"cat/{number}.png", root / f"cat/copy {number}.png")
    found = read()
    sides = [{pixels.tobytes() for pixels in each.pixels} for each in (found.train, found.test)]
    assert len(found.train.pixels) + len(found.test.pixels) == 50
    assert not sides[0] & sides[1]
    assert "10 exact copies stay on the side of their originals" in found.notes


def test_too_few_different_images_are_split_nevertheless_and_that_is_said(read, tmp_path):
    root = tmp_path / "own"
    place(root, "cat/0.png", "dog/0.png")
    for name in ("cat", "dog"):
        for number in range(1, 6):
            shutil.copy(root / name / "0.png", root / name / f"{number}.png")
    assert "10 exact copies, of which 2 stand on both sides: too few others" in read().notes


def test_a_name_that_is_no_text_is_read(read, tmp_path):
    place(tmp_path / "own", *classes_of("cat", "dog"))
    os.rename(tmp_path / "own/cat/0.png", os.fsencode(tmp_path / "own/cat/") + b"\xff\xfe.png")
    found = read()
    assert len(found.train.pixels) + len(found.test.pixels) == 20


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("training_set", "test_set"),
        ("train2017", "val2017"),
        ("cars_train", "cars_test"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("photos/train", "photos/test"),
    ],
)
def test_names_that_differ_by_the_word_of_a_split_are_splits(read, tmp_path, train, test):
    root = tmp_path / "own"
    place(root, *classes_of(f"{train}/a", f"{train}/b"), *classes_of(f"{test}/a", f"{test}/b"))
    found = read()
    assert (len(found.train.pixels), len(found.test.pixels)) == (20, 20)
    assert found.class_names == ["a", "b"]
    assert "2 classes by folder" in found.notes
    assert "called a, b" in found.notes


@pytest.mark.parametrize("names", [("train_a", "test_b"), ("strain", "stest")])
def test_other_names_stay_classes(read, tmp_path, names):
    place(tmp_path / "own", *classes_of(*names))
    assert read().class_names == sorted(names)


def test_tests_without_a_training_are_refused(read, tmp_path):
    place(tmp_path / "own", *classes_of("test/a", "test/b", "val/a", "val/b"))
    with pytest.raises(UserError, match="only test/, val/; call the folder to train on train/"):
        read()
    assert len(read(labels=False).train.pixels) == 40


def test_a_test_without_labels_gives_way_to_a_validation_with_them(read, tmp_path):
    place(tmp_path / "own", *classes_of("train/a", "train/b", "test", "val/a", "val/b"))
    found = read()
    assert (len(found.train.pixels), len(found.test.pixels)) == (20, 20)
    assert "val/ for the test" in found.notes
    assert "test/ holds 10 images without labels and is left out" in found.notes


def test_a_test_of_one_of_the_classes_has_labels(read, tmp_path):
    place(tmp_path / "own", *classes_of("train/a", "train/b", "test/b"), "test/loose.png", "x.png")
    found = read()
    assert found.test.labels.tolist() == [1] * 10 + [NO_LABEL]
    assert "test: 11 images, 1 of them without a label" in found.notes
    assert "x.png left out" in found.notes


def test_an_empty_train_folder_is_named(read, tmp_path):
    place(tmp_path / "own", *classes_of("test/a", "test/b"))
    (tmp_path / "own" / "train" / "a").mkdir(parents=True)
    with pytest.raises(UserError, match="no image found in train/"):
        read()


def test_pipes_are_left_out_and_nobody_waits_for_them(read, tmp_path):
    root = tmp_path / "own"
    place(root, *classes_of("a", "b"))
    os.mkfifo(root / "a" / "pipe.png")
    os.mkfifo(root / "a" / "pipe")
    found = read()
    assert len(found.train.pixels) + len(found.test.pixels) == 20
    assert [os.path.basename(name) for name in found.unreadable] == ["pipe.png"]
    assert "left out: 1 pipes and devices" in found.notes


def test_a_second_link_to_a_folder_is_counted(read, tmp_path):
    place(tmp_path, *classes_of("real/cat", "real/dog"))
    for name, target in (("cat", "cat"), ("dog", "dog"), ("wolf", "dog")):
        (tmp_path / "own" / name).symlink_to(tmp_path / "real" / target)
    found = read()
    assert found.class_names == ["cat", "dog"]
    assert "left out: 1 links to folders that are there already" in found.notes


def test_a_closed_folder_is_counted(read, tmp_path, monkeypatch):
    place(tmp_path / "own", *classes_of("a", "b", "closed"))
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("/closed"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    found = read()
    assert found.class_names == ["a", "b"]
    assert "left out: 1 folders that can't be read" in found.notes


@pytest.mark.parametrize("path", ["~nobody-of-this-name/x", "loop"])
def test_a_path_that_leads_nowhere_gets_one_line(tmp_path, cache_dir, path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    path = path if path.startswith("~") else str(tmp_path / path)
    source = FolderSource(name="own", path=path, labels=True, test_fraction=None)
    with pytest.raises(UserError, match="no such folder"):
        open_images(source, 8, cache_dir)


def test_a_class_of_which_nothing_can_be_read_is_none(read, tmp_path):
    root = tmp_path / "own"
    place(root, *classes_of("a", "c"))
    (root / "b").mkdir()
    for number in range(10):
        (root / "b" / f"{number}.png").touch()
    found = read()
    assert found.class_names == ["a", "c"]
    assert sorted(found.train.labels.tolist()) == [0] * 8 + [1] * 8
    assert len(found.unreadable) == 10
    assert {"2 classes by folder", "4 labelled images are kept for the test"} <= set(found.notes)
    assert not [note for note in found.notes if "copies" in note]  # of nothing


def test_a_copy_without_a_label_stays_with_its_original(read, tmp_path):
    root = tmp_path / "own"
    place(root, *classes_of("a", "b", count=12))
    for number in range(12):
        shutil.copy(root / f"a/{number}.png", root / f"copy {number}.png")
    found = read()
    sides = [{pixels.tobytes() for pixels in each.pixels} for each in (found.train, found.test)]
    assert not sides[0] & sides[1]
    assert "12 exact copies stay on the side of their originals" in found.notes


def test_whatever_names_hold_can_be_printed(read, tmp_path):
    root = tmp_path / "own"
    place(root, *classes_of("two\nlines", "red\x1b[31m"))
    os.rename(root / "two\nlines", os.fsencode(root) + b"/two\xff")
    (root / "x.a\nb").touch()
    (root / "red\x1b[31m" / "b\x1b.png").touch()
    for number in range(9):
        (root / f"x.{number}").touch()
    found = read()
    assert found.class_names == ["red\\x1b[31m", "two\\xff"]
    assert all(note.isprintable() for note in found.notes)
    left_out = next(note for note in found.notes if note.startswith("left out"))
    assert left_out.endswith("and 5 more")
    assert name_some(found.unreadable).endswith(r"b\x1b.png")


NAMES = st.sampled_from(["cat", "dog", "train", "Test", "val", "__MACOSX", ".hidden", "deep er"])
ENDS = st.sampled_from([".png", ".PNG", ".jpg", ".txt", "", ".gif"])
FILES = st.tuples(st.lists(NAMES, max_size=3), st.sampled_from("abcdef"), ENDS, st.booleans())


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(FILES, max_size=25), st.booleans(), st.sampled_from([None, 0.3]))
def test_whatever_a_folder_holds_there_are_true_numbers_or_a_line(
    tmp_path_factory, files, labels, fraction
):
    root = tmp_path_factory.mktemp("any")
    for number, (folders, name, end, good) in enumerate(files):
        file = root.joinpath(*folders, name + end)
        if any(parent.is_file() for parent in file.parents) or file.is_dir():
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        if good:
            Image.new("RGB", (5, 5), (number * 9, 0, 0)).save(file, "PNG")
        else:
            file.write_bytes(b"broken")
    source = FolderSource(name="any", path=str(root), labels=labels, test_fraction=fraction)
    try:
        found = open_images(source, 4, root.parent / "cache")
    except UserError:
        return  # which is a line, see fedssl.errors
    count = len(found.train.pixels) + (len(found.test.pixels) if found.test else 0)
    assert count + len(found.unreadable) <= len(find_images(root).files)
    for images in filter(None, (found.train, found.test)):
        if images.labels is not None:
            assert len(images.labels) == len(images.pixels)
            assert images.labels.max() < len(found.class_names)
    counted = [int(note.split()[0]) for note in found.notes if note.endswith("classes by folder")]
    assert counted in ([], [len(found.class_names)])
