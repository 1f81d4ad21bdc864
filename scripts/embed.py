"""Features of every image of a folder, by the encoder that a run has trained.

python -m scripts.embed photos                            # features.parquet, by the newest run
python -m scripts.embed photos --neighbours=neighbours.png
python -m scripts.embed photos --encoder=encoder.safetensors --out=features.parquet
"""

from fedssl.config.help import answer

if __name__ == "__main__":
    answer("embed")  # before the imports below, which take seconds


import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import DictConfig
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedssl.compute import choose_backend
from fedssl.config.command_line import HYDRA_OPTIONS, run_entry
from fedssl.data.decoding import decode, decode_batches
from fedssl.data.sources.folder import (
    ENDINGS,
    TEST,
    TRAIN,
    VALIDATION,
    class_names,
    encoded,
    list_images,
    show_path,
)
from fedssl.errors import UserError, name_some
from fedssl.evaluation.features import extract_features
from fedssl.files import check_replaceable, replacing
from fedssl.reporting.figures import draw_neighbours
from fedssl.runs.encoder_file import TrainedEncoder, find_encoder, load_encoder
from fedssl.terminal import can_rewrite, console_on

SPLITS = {*TRAIN, *TEST, *VALIDATION}
QUERIES = 6  # images whose nearest neighbours are drawn


def name_folder(arguments: Sequence[str]) -> list[str]:
    """Turn the one argument without a name into the override `folder=`.

    Raises:
        UserError: there are several.
    """
    free = [a for before, a in pairwise(["", *arguments]) if before not in HYDRA_OPTIONS]
    bare = [a for a in free if not a.startswith("-") and ("=" not in a or Path(a).is_dir())]
    if len(bare) > 1:
        raise UserError(f"{name_some(bare)}: give one folder")
    quoted = ["folder='{}'".format(folder.replace("'", r"\'")) for folder in bare]
    return [*(argument for argument in arguments if argument not in bare), *quoted]


def prepare(settings: DictConfig) -> tuple[TrainedEncoder, Path, list[Path]]:
    """Check all that can be checked before any work starts; list the images.

    Raises:
        UserError: the first thing that is wrong.
    """
    root = open_folder(settings, "embed")
    trained = load_encoder(find_encoder(settings.encoder, settings.run))
    return trained, root, find_files(settings, root)


def open_folder(settings: DictConfig, script: str) -> Path:
    """Find the folder that was given, and make sure that the results can be written.

    Args:
        script: whose settings these are.

    Raises:
        UserError: no folder, or a file that can't be written.
    """
    if settings.folder is None:
        raise UserError(
            f"no folder given; add the one with the images: python -m scripts.{script} FOLDER"
        )
    root = Path(os.path.expanduser(settings.folder))  # which leaves a user's that is not there
    if not root.is_dir():
        raise UserError(f"folder={settings.folder}: no such folder; check the path")
    for key in ("out", "neighbours"):
        if settings[key] is not None:
            check_replaceable(key, settings[key])
    return root


def find_files(settings: DictConfig, root: Path) -> list[Path]:
    """List the images of the folder.

    Raises:
        UserError: there are none.
    """
    files = list_images(root)
    if not files:
        raise UserError(
            f"folder={settings.folder}: no image found (looked for {', '.join(ENDINGS)})"
        )
    return files


def find_labels(paths: Sequence[Path]) -> list[str | None] | None:
    """Name the class of every image, if it lies in class folders, below train/ and test/ or not."""
    if {path.parts[0].lower() for path in paths} <= SPLITS and all(
        len(path.parts) > 1 for path in paths
    ):
        paths = [Path(*path.parts[1:]) for path in paths]
    names = class_names(paths)
    return [name or None for name in names] if names else None


@dataclass
class Encoding:
    """What became of the images of a folder: those that could be read, and the names of others."""

    read: list[Path] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def encode_files(
    trained: TrainedEncoder, files: Sequence[Path], batch_size: int, precision: str, done: Encoding
) -> Iterator[tuple[list[Path], np.ndarray]]:
    """Encode images, a batch at a time, with a bar in terminals.

    Args:
        done: told of every image.

    Yields:
        The files of a batch that could be read, and their features, float32 (N, D).
    """
    backend = choose_backend(precision)
    encoder = trained.encoder.to(backend.device)
    with show_progress() as progress:
        task = progress.add_task("encoding", total=len(files))
        for batch in decode_batches(encoded(files), trained.image_size, batch_size):
            good = [(image.data, decoded.pixels) for image, decoded in batch if decoded]
            done.unreadable += [image.name for image, decoded in batch if decoded is None]
            if good:
                names, pixels = zip(*good, strict=True)
                done.read += names
                given = np.stack(pixels), backend, batch_size, trained.image_size
                yield list(names), extract_features(encoder, *given)
            progress.advance(task, len(batch))


def write_features(
    file: Path,
    trained: TrainedEncoder,
    root: Path,
    files: Sequence[Path],
    batch_size: int,
    precision: str,
) -> Encoding:
    """Write the features of images below a root to Parquet, a batch at a time.

    Columns: `path` below the root, `features` (as many float32 for each), and
    `label` where there are class folders. The schema's metadata is the encoder's.
    """
    paths = [path.relative_to(root) for path in files]
    labels = dict(zip(files, find_labels(paths) or [], strict=False))
    schema, done = make_schema(trained, labelled=bool(labels)), Encoding()
    with pq.ParquetWriter(file, schema) as writer:
        for names, features in encode_files(trained, files, batch_size, precision, done):
            columns = {
                "path": [show_path(name.relative_to(root)) for name in names],
                "label": [labels.get(name) for name in names],
                "features": pa.FixedSizeListArray.from_arrays(
                    features.reshape(-1), features.shape[1]
                ),
            }
            writer.write_batch(pa.record_batch([columns[n] for n in schema.names], schema))
    return done


def show_progress() -> Progress:
    """Make a bar that is there while images are encoded, in terminals only."""
    console = console_on(sys.stderr)
    parts = (BarColumn(), MofNCompleteColumn(), TextColumn("images,"), TimeRemainingColumn())
    shown = can_rewrite(console)
    return Progress(*parts, console=console, transient=True, disable=not shown)


def make_schema(trained: TrainedEncoder, labelled: bool) -> pa.Schema:
    """Name the columns of the feature file."""
    columns = {"path": pa.string()} | ({"label": pa.string()} if labelled else {})
    columns["features"] = pa.list_(pa.float32(), trained.encoder.feature_size)
    return pa.schema(columns, metadata=dict(trained.metadata))


class DecodedOnDemand:
    """Images by their row, decoded when asked for."""

    def __init__(self, files: list[Path], image_size: int) -> None:
        self.files, self.image_size = files, image_size

    def __getitem__(self, row: int) -> np.ndarray:
        pixels = decode(self.files[row], self.image_size)
        if pixels is None:
            raise OSError(f"{self.files[row]} could be read before, but no longer")
        return pixels


def picture_neighbours(
    file: Path,
    features: np.ndarray,
    images: list[Path],
    image_size: int,
    names: Sequence[str] | None,
) -> None:
    """Draw some images and those most similar to each.

    Args:
        features: float32 (N, D), of the images.
        names: below each image.
    """
    queries = np.linspace(0, len(images) - 1, min(QUERIES, len(images))).round().astype(np.int64)
    draw_neighbours(DecodedOnDemand(images, image_size), features, file, queries.tolist(), names)


def read_features(file: Path) -> tuple[np.ndarray, list[str] | None]:
    """Read what `write_features` wrote: features (N, D), and labels where there are any."""
    table = pq.read_table(file)
    features = table["features"].combine_chunks().values.to_numpy().reshape(len(table), -1)
    return features, table["label"].to_pylist() if "label" in table.column_names else None


def tell_unreadable(done: Encoding, root: Path) -> list[Path]:
    """Say which files were left out; give the others.

    Raises:
        UserError: there are no others.
    """
    count = len(done.read) + len(done.unreadable)
    if not done.read:
        raise UserError(f"folder={root}: none of the {count} images can be read")
    if names := done.unreadable:
        print(f"{len(names)} unreadable files left out: {name_some(names)}")
    return done.read


def embed(settings: DictConfig) -> None:
    """Write the features of a folder, and the picture if asked for; say what was done."""
    trained, root, files = prepare(settings)
    print(f"Embedding {len(files):,} images of {root} with {trained}")
    out = Path(settings.out).expanduser()
    try:
        with replacing(out) as temporary:
            done = write_features(
                temporary, trained, root, files, settings.batch_size, settings.precision
            )
            read = tell_unreadable(done, root)
        print(f"{out}: {len(read):,} images, {trained.encoder.feature_size} features each")
        if settings.neighbours and len(read) > 1:
            picture = Path(settings.neighbours).expanduser()
            features, labels = read_features(out)
            picture_neighbours(picture, features, read, trained.image_size, labels)
            print(f"{picture}: some of them, and those most similar to each")
    except OSError as error:
        raise RuntimeError(f"can't go on: {error}") from error


if __name__ == "__main__":
    run_entry("embed", prepare, embed, name_folder)
