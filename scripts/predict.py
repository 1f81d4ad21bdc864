"""The class of every image of a folder, by the classifier that `eval=federated` left in a run.

python -m scripts.predict photos                            # predictions.csv, by the newest run
python -m scripts.predict photos --neighbours=neighbours.png
python -m scripts.predict photos --classifier=classifier.safetensors --out=predictions.csv
"""

from fedssl.config.help import answer

if __name__ == "__main__":
    answer("predict")  # before the imports below, which take seconds


import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig

from fedssl.config.command_line import run_entry
from fedssl.data.sources.folder import show_path
from fedssl.errors import UserError
from fedssl.files import replacing
from fedssl.runs.encoder_file import (
    CLASSIFIER_FILE,
    Classifier,
    TrainedEncoder,
    find_encoder,
    load_encoder,
)
from scripts.embed import (
    Encoding,
    encode_files,
    find_files,
    find_labels,
    name_folder,
    open_folder,
    picture_neighbours,
    tell_unreadable,
)


def prepare(settings: DictConfig) -> tuple[TrainedEncoder, Classifier, Path, list[Path]]:
    """Check all that can be checked before any work starts; list the images.

    Raises:
        UserError: the first thing that is wrong.
    """
    root = open_folder(settings, "predict")
    file = find_encoder(settings.classifier, settings.run, CLASSIFIER_FILE)
    trained = load_encoder(file)
    if trained.classifier is None:
        raise UserError(f"classifier={file}: holds an encoder alone; give a {CLASSIFIER_FILE}")
    return trained, trained.classifier, root, find_files(settings, root)


def write_predictions(
    file: Path,
    paths: Sequence[Path],
    probabilities: np.ndarray,
    classes: Sequence[str],
    labels: Sequence[str | None] | None,
) -> list[str]:
    """Write a line for each image: path, class, probability, and label where there are any.

    Returns:
        The classes.
    """
    best = probabilities.argmax(axis=1)
    names = [classes[number] for number in best]
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(["path", "class", "probability", *(["label"] if labels else [])])
        for row, (path, name) in enumerate(zip(paths, names, strict=True)):
            told = [show_path(path), name, f"{probabilities[row, best[row]]:.4f}"]
            writer.writerow([*told, *([labels[row] or ""] if labels else [])])
    return names


def describe(names: Sequence[str], labels: Sequence[str | None] | None) -> str:
    """Say how many images are of which class, and how many are right where labels tell."""
    counts = ", ".join(f"{name} {count:,}" for name, count in Counter(names).most_common())
    known = [(a, b) for a, b in zip(names, labels or [], strict=False) if b]
    right = sum(a.casefold() == b.casefold() for a, b in known)
    share = f"; {right:,} of {len(known):,} as their folders say" if known else ""
    return f"{counts}{share}"


def predict(settings: DictConfig) -> None:
    """Write the classes of a folder's images, and the picture if asked for; say what was done."""
    trained, classifier, root, files = prepare(settings)
    print(f"Classifying {len(files):,} images of {root} with {trained}")
    out, done = Path(settings.out).expanduser(), Encoding()
    try:
        batches = encode_files(trained, files, settings.batch_size, settings.precision, done)
        features = [found for _, found in batches]
        paths = [path.relative_to(root) for path in tell_unreadable(done, root)]
        every = np.concatenate(features)
        probabilities = classifier.probabilities(torch.from_numpy(every)).numpy()
        labels = find_labels(paths)
        with replacing(out) as temporary:
            given = paths, probabilities, classifier.classes, labels
            names = write_predictions(temporary, *given)
        print(f"{out}: {describe(names, labels)}")
        if settings.neighbours and len(paths) > 1:
            picture = Path(settings.neighbours).expanduser()
            told = [f"{n} {p:.0%}" for n, p in zip(names, probabilities.max(axis=1), strict=True)]
            picture_neighbours(picture, every, done.read, trained.image_size, told)
            print(f"{picture}: some of them, and those most similar to each")
    except OSError as error:
        raise RuntimeError(f"can't go on: {error}") from error


if __name__ == "__main__":
    run_entry("predict", prepare, predict, name_folder)
