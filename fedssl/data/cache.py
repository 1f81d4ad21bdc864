"""Decoded images, kept in a cache that all processes share."""

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from fedssl.data.decoding import decode_batches
from fedssl.data.image_set import Images, ImageSet
from fedssl.data.sources.base import NO_LABEL, Encoded, Kept, Source, Splits
from fedssl.errors import WARNING, UserError, name_some, printable
from fedssl.files import sync_folder, write_atomically

CACHE_FORMAT = 5
DECODE_BATCH = 1024

Report = Callable[[str], None]


def open_image_set(
    source: Source,
    image_size: int,
    cache_dir: str,
    seed: int,
    report: Report = lambda line: None,
    verify: bool = True,
) -> ImageSet:
    """Open an image set, decoding it into the cache the first time.

    The cache is keyed by the source's fingerprint and the image size, written
    under a temporary name and renamed, and shared by all processes through the
    page cache.

    Args:
        image_size: side of the decoded images in pixels.
        cache_dir: where decoded images are kept; ~ is the home directory.
        seed: decides the test split where the source has none.
        report: told, in one line, of work that takes long.
        verify: compare the cache with its checksums, and build it again where
            they differ; that reads all of it.

    Raises:
        UserError: the data can't be found or read, or the cache not written.
    """
    with _reading(source):
        source.check()
        entry = Path(cache_dir).expanduser() / _name_entry(source, image_size, seed)
    damage = find_damage(entry) if verify and entry.is_dir() else None
    if damage:
        report(f"{WARNING}the cache {entry} is damaged ({damage}) and is built again")
    fresh = damage is not None or not entry.is_dir()
    if fresh:
        _build_cache(entry, source, image_size, seed, report)
    return replace(_open_cache(entry, source.title), fresh=fresh)


def find_damage(entry: Path) -> str | None:
    """Compare a cache entry with its checksums; say what is wrong with it, if anything."""
    try:
        meta = json.loads((entry / "meta.json").read_bytes())
        own_digest = meta.pop("sha256")
        if _digest_of(meta) != own_digest:
            return "meta.json differs from its checksum"
        for name, digest in meta["files"].items():
            with (entry / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return f"{name} differs from its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _digest_of(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _name_entry(source: Source, image_size: int, seed: int) -> str:
    """Name the entry by what decides the decoded images."""
    parts = [str(CACHE_FORMAT), str(image_size), *source.fingerprint(seed)]
    # File names may hold bytes that are no text.
    digest = hashlib.sha256("\n".join(parts).encode(errors="surrogateescape")).hexdigest()[:16]
    return f"{source.title.replace('/', '--')}-{image_size}px-{digest}"


def _build_cache(entry: Path, source: Source, image_size: int, seed: int, report: Report) -> None:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{entry.name}.", dir=entry.parent))
    except OSError as error:
        raise UserError(
            f"cache_dir={entry.parent}: can't be written ({error.strerror}); choose another",
            public=f"its cache can't be written ({_kind_of(error)})",
        ) from error
    try:
        built, temporary = scratch / "built", scratch / "source"
        built.mkdir()
        temporary.mkdir()
        with _reading(source):
            splits = source.read(seed, temporary)
        total = sum(split.count for split in splits.splits.values())
        if total > DECODE_BATCH * 2:
            report(f"Decoding {total:,} images, once; later runs open the cache.")
        _write_entry(built, splits, image_size, source.place)
        _put_in_place(built, entry, scratch / "damaged")
    except OSError as error:
        raise UserError(
            f"cache_dir={entry.parent}: can't be written ({error}); free space or choose another",
            public=f"its cache can't be written ({_kind_of(error)})",
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _reading(source: Source) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{source.place}: can't be read ({error}); check the files",
            public=f"its images can't be read ({_kind_of(error)})",
        ) from error


def _kind_of(error: OSError) -> str:
    """Say what the system refused, without a name of a file."""
    return os.strerror(error.errno) if error.errno else type(error).__name__


def _write_entry(built: Path, splits: Splits, image_size: int, place: str) -> None:
    """Write decoded images, labels and their description into a folder.

    Raises:
        UserError: no image of a split can be read.
    """
    unreadable: list[str] = []
    assumed: Counter[str] = Counter()
    sizes = {}
    kept_labels: dict[str, np.ndarray | None] = {}
    for name, split in splits.splits.items():
        pixels = built / f"{name}.pixels"
        kept = _write_pixels(pixels, split.read(), image_size, unreadable, assumed)
        if not kept:
            raise UserError(
                f"{place}: none of the {split.count} {name} images can be "
                f"read ({name_some(unreadable)}); check the files",
                public=f"none of its {split.count} {name} images can be read",
            )
        sizes[name] = len(kept)
        kept_labels[name] = None if split.labels is None else split.labels[kept]
    classes = _write_labels(built, splits, kept_labels)
    meta = {
        "sizes": sizes,
        "image_size": image_size,
        "class_names": classes,
        "notes": [
            printable(note if isinstance(note, str) else note(kept_labels)) for note in splits.notes
        ],
        "unreadable": unreadable,
        "assumed": dict(assumed),
        "files": {file.name: _sync(file) for file in sorted(built.iterdir())},
    }
    text = json.dumps(meta | {"sha256": _digest_of(meta)})
    write_atomically(built / "meta.json", text.encode())


def _write_labels(built: Path, splits: Splits, kept: Kept) -> list[str]:
    """Write the labels of each split that has any; name their classes.

    A class of which no image can be read is none; the others are numbered anew.

    Args:
        kept: of the images that can be read, int64 (N,) from 0 on or NO_LABEL.
    """
    known = {name: labels for name, labels in kept.items() if labels is not None}
    found = set(chain.from_iterable(labels.tolist() for labels in known.values())) - {NO_LABEL}
    given = [split.labels for split in splits.splits.values() if split.labels is not None]
    lost = set(chain.from_iterable(labels.tolist() for labels in given)) - found
    names = splits.class_names or [str(number) for number in range(max(found, default=-1) + 1)]
    classes = [number for number in range(len(names)) if number not in lost]
    for name, labels in known.items():
        if (labels != NO_LABEL).any():
            numbers = np.searchsorted(classes, labels)
            np.save(built / f"{name}.labels.npy", np.where(labels == NO_LABEL, NO_LABEL, numbers))
    return [printable(names[number]) for number in classes]


def _sync(file: Path) -> str:
    """Make a file survive a power cut; give its SHA-256."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _put_in_place(built: Path, entry: Path, aside: Path) -> None:
    """Rename a finished entry into place, unless another process was faster."""
    for _ in range(3):
        try:
            os.rename(built, entry)
            return sync_folder(entry.parent)
        except OSError:
            if find_damage(entry) is None:
                return None
            with suppress(OSError):
                os.rename(entry, aside)
    raise OSError(f"{entry} is in the way")


def _write_pixels(
    file: Path,
    images: Iterator[Encoded],
    image_size: int,
    unreadable: list[str],
    assumed: Counter[str],
) -> list[int]:
    """Decode images into a file, some at a time; return which ones could be read.

    Args:
        unreadable: gets the names of the others.
        assumed: counts what was decided for files that left it open.
    """
    kept: list[int] = []
    batches = decode_batches(images, image_size, DECODE_BATCH)
    with file.open("wb") as out:
        for row, (image, decoded) in enumerate(chain.from_iterable(batches)):
            if decoded is None:
                unreadable.append(image.name)
            else:
                out.write(decoded.pixels.tobytes())
                assumed.update(decoded.assumed)
                kept.append(row)
    return kept


def _open_cache(entry: Path, name: str) -> ImageSet:
    try:
        meta = json.loads((entry / "meta.json").read_bytes())
        side = meta["image_size"]

        def images(split: str) -> Images:
            shape = (meta["sizes"][split], 3, side, side)
            pixels = np.memmap(entry / f"{split}.pixels", dtype=np.uint8, mode="r", shape=shape)
            labels = entry / f"{split}.labels.npy"
            return Images(pixels, np.load(labels) if labels.is_file() else None)

        test = images("test") if "test" in meta["sizes"] else None
        classes, unreadable = meta["class_names"], meta["unreadable"]
        content = meta["files"]["train.pixels"]
        assumed = [f"{what} ({count} images)" for what, count in meta["assumed"].items()]
        notes = [*meta["notes"], *assumed]
        return ImageSet(
            images("train"), test, classes, unreadable, entry.name, content, name, notes
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the cache {entry} is damaged ({error}); delete it", public="its cache is damaged"
        ) from error
