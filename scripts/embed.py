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
from collections.abc import Sequence
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
    if settings.folder is None:
        raise UserError(
            "no folder given; add the one with the images: python -m scripts.embed FOLDER"
        )
    root = Path(os.path.expanduser(settings.folder))  # which leaves a user's that is not there
    if not root.is_dir():
        raise UserError(f"folder={settings.folder}: no such folder; check the path")
    for key in ("out", "neighbours"):
        if settings[key] is not None:
            check_replaceable(key, settings[key])
    trained = load_encoder(find_encoder(settings.encoder, settings.run))
    files = list_images(root)
    if not files:
        raise UserError(
            f"folder={settings.folder}: no image found (looked for {', '.join(ENDINGS)})"
        )
    return trained, root, files


def find_labels(paths: Sequence[Path]) -> list[str | None] | None:
    """Name the class of every image, if it lies in class folders, below train/ and test/ or not."""
    if {path.parts[0].lower() for path in paths} <= SPLITS and all(
        len(path.parts) > 1 for path in paths
    ):
        paths = [Path(*path.parts[1:]) for path in paths]
    names = class_names(paths)
    return [name or None for name in names] if names else None


def write_features(
    file: Path,
    trained: TrainedEncoder,
    root: Path,
    files: Sequence[Path],
    batch_size: int,
    precision: str,
) -> tuple[list[Path], list[str]]:
    """Write the features of images below a root to Parquet, a batch at a time.

    Columns: `path` below the root, `features` (as many float32 for each), and
    `label` where there are class folders. The schema's metadata is the encoder's.

    Returns:
        The files that could be read, and the names of the others.
    """
    backend = choose_backend(precision)
    encoder = trained.encoder.to(backend.device)
    paths = [path.relative_to(root) for path in files]
    labels = dict(zip(files, find_labels(paths) or [], strict=False))
    schema = make_schema(trained, labelled=bool(labels))
    read, unreadable = [], []
    with (
        pq.ParquetWriter(file, schema) as writer,
        show_progress() as progress,
    ):
        task = progress.add_task("embedding", total=len(files))
        for batch in decode_batches(encoded(files), trained.image_size, batch_size):
            good = [(image.data, decoded.pixels) for image, decoded in batch if decoded]
            unreadable += [image.name for image, decoded in batch if decoded is None]
            if good:
                names, pixels = zip(*good, strict=True)
                features = extract_features(
                    encoder, np.stack(pixels), backend, batch_size, trained.image_size
                )
                columns = {
                    "path": [show_path(name.relative_to(root)) for name in names],
                    "label": [labels.get(name) for name in names],
                    "features": pa.FixedSizeListArray.from_arrays(
                        features.reshape(-1), features.shape[1]
                    ),
                }
                writer.write_batch(pa.record_batch([columns[n] for n in schema.names], schema))
                read += names
            progress.advance(task, len(batch))
    return read, unreadable


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


def picture_neighbours(file: Path, out: Path, images: list[Path], image_size: int) -> None:
    """Draw some images and those most similar to each, by the features just written."""
    table = pq.read_table(out)
    column = table["features"].combine_chunks()
    features = column.values.to_numpy().reshape(len(images), -1)
    names = table["label"].to_pylist() if "label" in table.column_names else None
    queries = np.linspace(0, len(images) - 1, min(QUERIES, len(images))).round().astype(np.int64)
    draw_neighbours(DecodedOnDemand(images, image_size), features, file, queries.tolist(), names)


def embed(settings: DictConfig) -> None:
    """Write the features of a folder, and the picture if asked for; say what was done."""
    trained, root, files = prepare(settings)
    print(f"Embedding {len(files):,} images of {root} with {trained}")
    out = Path(settings.out).expanduser()
    try:
        with replacing(out) as temporary:
            read, unreadable = write_features(
                temporary, trained, root, files, settings.batch_size, settings.precision
            )
            if not read:
                raise UserError(f"folder={root}: none of the {len(files)} images can be read")
        if unreadable:
            print(f"{len(unreadable)} unreadable files left out: {name_some(unreadable)}")
        print(f"{out}: {len(read):,} images, {trained.encoder.feature_size} features each")
        if settings.neighbours and len(read) > 1:
            picture = Path(settings.neighbours).expanduser()
            picture_neighbours(picture, out, read, trained.image_size)
            print(f"{picture}: some of them, and those most similar to each")
    except OSError as error:
        raise RuntimeError(f"can't go on: {error}") from error


if __name__ == "__main__":
    run_entry("embed", prepare, embed, name_folder)
