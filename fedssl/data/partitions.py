"""Which images each client holds."""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedssl.data.image_set import Images, ImageSet
from fedssl.data.sources.base import NO_LABEL
from fedssl.errors import SettingError, UserError
from fedssl.files import write_atomically
from fedssl.seeding import derive_seed

CHECKSUM = "sha256"


def open_partitions(
    image_set: ImageSet, cache_dir: str, num_partitions: int, spec: Mapping[str, Any], seed: int
) -> list[np.ndarray]:
    """Give `partition_rows` of the training images, kept beside them in the cache.

    The partitioners take seconds and 200 MB to import, which every client
    process would pay. A damaged file is written anew.

    Args:
        spec: the `partition` section as plain values.

    Returns:
        For each client the rows of its images, int64, disjoint.

    Raises:
        UserError: as `partition_rows`.
    """
    decides = [image_set.content, num_partitions, dict(spec), seed, version("flwr-datasets")]
    key = hashlib.sha256(json.dumps(decides, default=str).encode()).hexdigest()[:16]
    folder = Path(cache_dir).expanduser() / image_set.key
    file = folder / f"partitions-{key}.safetensors"
    parts = _read_parts(file)
    if parts is None:
        parts = partition_rows(image_set.train, num_partitions, spec, seed)
        with suppress(OSError):  # they are dealt out alike every time
            write_atomically(file, _pack_parts(parts))
    return parts


def _pack_parts(parts: Sequence[np.ndarray]) -> bytes:
    arrays = {f"{number:06d}": rows for number, rows in enumerate(parts)}
    return save(arrays | {CHECKSUM: _checksum(parts)})


def _read_parts(file: Path) -> list[np.ndarray] | None:
    """Read what was packed; None where it is missing or damaged."""
    try:
        arrays = load(file.read_bytes())
    except (OSError, SafetensorError, ValueError):
        return None
    checksum = arrays.pop(CHECKSUM, None)
    parts = [arrays[name] for name in sorted(arrays)]
    intact = checksum is not None and np.array_equal(checksum, _checksum(parts))
    return parts if intact else None


def _checksum(parts: Sequence[np.ndarray]) -> np.ndarray:
    digest = hashlib.sha256()
    for rows in parts:
        digest.update(f"{rows.dtype} {rows.shape}".encode() + rows.tobytes())
    return np.frombuffer(digest.digest(), dtype=np.uint8)


def partition_rows(
    images: Images, num_partitions: int, spec: Mapping[str, Any], seed: int
) -> list[np.ndarray]:
    """Deal the training images out to the clients by a partitioner of flwr-datasets.

    Args:
        spec: the `partition` section as plain values: `_target_` and its
            arguments, and for the pathological one `classes_per_client`.

    Returns:
        For each client the rows of its images, int64, disjoint.

    Raises:
        UserError: the partitioner needs labels that don't exist, or can't deal
            the images out as asked.
    """
    import datasets
    from hydra.utils import instantiate

    arguments = dict(spec)
    classes_per_client = arguments.pop("classes_per_client", None)
    rows = np.random.default_rng(derive_seed(seed, "partition")).permutation(len(images.pixels))
    columns: dict[str, np.ndarray] = {"row": rows}
    partitioner_name = str(spec["_target_"]).rpartition(".")[2]
    if "partition_by" in arguments:
        if images.labels is None:
            raise SettingError(
                f"partition: {partitioner_name} needs labels, these images have none; "
                "use partition=iid"
            )
        columns["label"] = images.labels[rows]
    if classes_per_client is not None:
        columns["class_group"] = class_groups(columns["label"], classes_per_client, seed)
    try:
        partitioner = instantiate(arguments, num_partitions=num_partitions)
        partitioner.dataset = datasets.Dataset.from_dict(columns)
        with warnings.catch_warnings(action="ignore"):  # of each draw that it repeats
            parts = [partitioner.load_partition(i)["row"] for i in range(num_partitions)]
    except Exception as error:  # flwr-datasets raises ValueError, Hydra wraps it
        reason = str(error.__cause__ or error).splitlines()[0]
        failed = (
            f"partition: {partitioner_name} can't deal {len(rows)} images out to "
            f"{num_partitions} clients"
        )
        remedy = "change num_clients or partition"
        raise UserError(f"{failed} ({reason}); {remedy}", public=f"{failed}; {remedy}") from error
    return [np.asarray(part, dtype=np.int64) for part in parts]


def count_classes(image_set: ImageSet, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Count the images of each class in each part, int64 (parts, classes).

    Raises:
        ValueError: the images have no labels.
    """
    labels, classes = image_set.train.labels, len(image_set.class_names)
    if labels is None:
        raise ValueError("these images have no labels")
    known = [labels[rows][labels[rows] != NO_LABEL] for rows in parts]
    return np.stack([np.bincount(each, minlength=classes) for each in known])


def class_groups(labels: np.ndarray, classes_per_client: int, seed: int) -> np.ndarray:
    """Put the classes into groups of `classes_per_client`, drawn by the seed.

    Dealing out groups gives the clients disjoint classes until all are used;
    the library's own assignment leaves some classes with nobody.

    Raises:
        UserError: more classes per client than there are.
    """
    classes = np.unique(labels)  # images without a label are dealt out like those of a class
    known = np.count_nonzero(classes != NO_LABEL)
    if not 1 <= classes_per_client <= known:
        raise SettingError(
            f"partition.classes_per_client={classes_per_client}: must be from 1 to "
            f"{known}, the number of classes"
        )
    order = np.random.default_rng(derive_seed(seed, "class groups")).permutation(len(classes))
    return order[np.searchsorted(classes, labels)] // classes_per_client


def split_held_out(rows: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Split a client's rows, already in random order, into training and held-out ones.

    At least two are held out, the least that a contrastive loss can compare.

    Raises:
        UserError: fewer than two remain for training.
    """
    held_out = max(2, round(fraction * len(rows)))
    if len(rows) - held_out < 2:
        raise SettingError(
            f"a client has {len(rows)} images, too few to train on 2 and hold {held_out} out; "
            "use fewer clients or more images"
        )
    return rows[held_out:], rows[:held_out]
