"""Dealing the images out, and keeping what was dealt."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT

from fedssl.config.compose import load_config
from fedssl.data import partitions
from fedssl.data.image_set import Images
from fedssl.data.partitions import class_groups, open_partitions, partition_rows, split_held_out
from fedssl.errors import UserError


def partition(images, count, *overrides, seed=0):
    spec = load_config("config", [*overrides, f"seed={seed}"]).partition
    return partition_rows(images, count, spec, seed)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "pathological"])
@pytest.mark.parametrize("count", [5, 10])
def test_partitions_are_disjoint_and_complete(digits, kind, count):
    parts = partition(digits.train, count, f"partition={kind}")
    assert len(parts) == count
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1437))


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "pathological"])
def test_the_seed_decides_the_partitions(digits, kind):
    first, again = (partition(digits.train, 5, f"partition={kind}", seed=3) for _ in range(2))
    other = partition(digits.train, 5, f"partition={kind}", seed=4)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_iid_partitions_are_equal_and_mixed(digits):
    parts = partition(digits.train, 5)
    assert {len(part) for part in parts} <= {287, 288}
    assert all(len(np.unique(digits.train.labels[part])) == 10 for part in parts)


@pytest.mark.parametrize("classes", [1, 2, 3, 5])
def test_pathological_clients_see_so_many_classes(digits, classes):
    overrides = ["partition=pathological", f"partition.classes_per_client={classes}"]
    parts = partition(digits.train, 10, *overrides)
    seen = [len(np.unique(digits.train.labels[part])) for part in parts]
    assert max(seen) == classes
    if 10 % classes == 0:
        assert set(seen) == {classes}


def test_a_smaller_alpha_is_more_unequal(digits):
    def skew(alpha):
        parts = partition(digits.train, 5, "partition=dirichlet", f"partition.alpha={alpha}")
        counts = [np.bincount(digits.train.labels[part], minlength=10) for part in parts]
        return np.mean([row.max() / row.sum() for row in counts])

    assert skew(0.1) > skew(1.0) > skew(100.0)


@pytest.mark.parametrize(
    ("count", "overrides"),
    [
        (1438, []),
        (300, ["partition=dirichlet"]),
        (5, ["partition=pathological", "partition.classes_per_client=11"]),
    ],
)
def test_an_impossible_partition_gets_one_line(digits, count, overrides):
    with pytest.raises(UserError, match="partition") as error:
        partition(digits.train, count, *overrides)
    assert "\n" not in str(error.value)


def test_partitions_by_class_need_labels(digits):
    unlabelled = Images(digits.train.pixels, None)
    with pytest.raises(UserError, match=r"needs labels.*use partition=iid"):
        partition(unlabelled, 5, "partition=dirichlet")
    assert len(partition(unlabelled, 5)) == 5


def test_class_groups_cover_every_class():
    groups = class_groups(np.arange(10), 2, seed=0)
    assert np.bincount(groups).tolist() == [2] * 5


@pytest.mark.parametrize(("rows", "expected"), [(100, 10), (20, 2), (4, 2)])
def test_a_part_is_held_out(rows, expected):
    training, held_out = split_held_out(np.arange(rows), 0.1)
    assert len(held_out) == expected
    assert sorted([*training, *held_out]) == list(range(rows))


def test_too_few_images_for_a_client_are_refused():
    with pytest.raises(UserError, match="a client has 3 images"):
        split_held_out(np.arange(3), 0.1)


# --- what is kept ---------------------------------------------------------------


@pytest.fixture
def place(tmp_path, digits):
    """A cache with the entry of the digits, nothing dealt out yet."""
    (tmp_path / digits.key).mkdir()
    return tmp_path


def dealt(place, digits, *overrides, seed=0):
    spec = dict(load_config("config", [*overrides, f"seed={seed}"]).partition)
    return open_partitions(digits, str(place), 5, spec, seed)


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_was_dealt_is_read_without_the_partitioners(place, digits, monkeypatch):
    first = dealt(place, digits)
    assert same(first, partition(digits.train, 5))
    monkeypatch.setattr(partitions, "partition_rows", None)
    assert same(dealt(place, digits), first)
    with pytest.raises(TypeError):
        dealt(place, digits, seed=1)
    with pytest.raises(TypeError):
        dealt(place, digits, "partition=dirichlet")
    with pytest.raises(TypeError):
        dealt(place, replace(digits, content="other"))


@pytest.mark.parametrize("harm", [lambda b: b[:-9], lambda b: b[:-1] + bytes([b[-1] ^ 1])])
def test_damage_is_dealt_out_anew(place, digits, harm):
    first = dealt(place, digits)
    (file,) = (place / digits.key).iterdir()
    whole = file.read_bytes()
    file.write_bytes(harm(whole))
    assert same(dealt(place, digits), first)
    assert file.read_bytes() == whole


def test_without_a_place_to_keep_them_they_are_dealt_out_all_the_same(tmp_path, digits):
    assert len(dealt(tmp_path / "nowhere", digits)) == 5


def test_a_clients_process_stays_small(place, digits):
    """The libraries of the partitioners are not imported where nothing has to be dealt out."""
    dealt(place, digits)
    code = (
        "import sys, client; from fedssl.data import partitions;"
        "from fedssl.config.compose import load_config;"
        "from fedssl.data.image_set import ImageSet;"
        f"c = load_config('config', []); p = {str(place)!r};"
        f"s = ImageSet(None, None, [], [], {digits.key!r}, {digits.content!r}, 'digits');"
        "assert len(partitions.open_partitions(s, p, 5, dict(c.partition), 0)) == 5;"
        "print([m for m in ('datasets', 'flwr_datasets', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
