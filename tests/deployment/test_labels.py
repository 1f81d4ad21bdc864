"""Labels in class folders at two real nodes: the head and the score of one place."""

import numpy as np
import pytest
import torch
from conftest import create_run
from deployment.place import TINY
from PIL import Image
from sklearn.datasets import load_digits

from benchmarks.accuracy.sites import in_one_place
from fedssl.compute import Backend
from fedssl.config.compose import load_config
from fedssl.data.cache import open_image_set
from fedssl.data.sources.folder import labelled_folder
from fedssl.evaluation.features import extract_features
from fedssl.runs.checkpoints import Checkpoint, save_checkpoint
from fedssl.runs.encoder_file import CLASSIFIER_FILE, load_encoder
from fedssl.runs.metrics import RoundMetrics
from fedssl.sites.site import Site
from fedssl.sites.sums import Head
from utils import build_method


def save_digits(folder, classes, rows):
    """Save digits of some classes in class folders: those of some rows, by train and test."""
    images, labels = load_digits(return_X_y=True)
    for split, chosen in rows.items():
        for row in chosen[np.isin(labels[chosen], classes)]:
            home = folder / split / f"digit {labels[row]}"
            home.mkdir(parents=True, exist_ok=True)
            pixels = (images[row].reshape(8, 8) * 15.9).astype(np.uint8)
            Image.fromarray(pixels).save(home / f"{row}.png")
    return folder


@pytest.mark.slow
def test_labels_stay_in_the_class_folders_of_two_nodes(place):
    """The sites share some classes only; all of it equals what one place would give."""
    order = np.random.default_rng(0).permutation(1797)
    west = save_digits(
        place.folder / "west", range(7), {"train": order[:200], "test": order[200:300]}
    )
    east = save_digits(
        place.folder / "east", range(3, 10), {"train": order[300:500], "test": order[500:600]}
    )
    photos = save_digits(place.folder / "photos", range(10), {"": order[600:700]})
    given = ["num_rounds=1", "num_clients=2", "dataset=imagefolder", "dataset.image_size=8"]
    config = load_config("config", [*TINY, *given, f"cache_dir={place.folder}/cache"])
    run = create_run(place.outputs / "run", config)
    state = build_method(config, torch.device("cpu")).state_dict()
    save_checkpoint(run.checkpoints, Checkpoint(1, state, metrics=RoundMetrics(1)), keep=1)
    place.superlink()
    place.client(1, "--node-config", f'partition-id=0 data-path="{west}"')
    folders = f'data-path="{photos}" labels-path="{east}"'
    place.client(2, "--node-config", f"partition-id=1 {folders}")
    given += [f"run={run.path}", "eval.seeds=1", "eval.epochs=1", "eval.baselines=false"]
    given.append("eval.label_fraction=1")
    place.server(*given, "eval=federated", name="evaluation")
    assert place.end("evaluation", 300) == 0, place.all_logs()
    assert "federated SimCLR, head from sums: " in place.log("evaluation")

    opened = [
        open_image_set(labelled_folder(str(site), None), 8, str(place.folder / "cache"), 0)
        for site in (west, east)
    ]
    kept = load_encoder(run.path / CLASSIFIER_FILE)
    names = list(kept.classifier.classes)
    assert names == [f"digit {number}" for number in range(10)]
    backend = Backend(torch.device("cpu"), torch.float32)
    features, labels, tests, truth = [], [], [], []
    for images in opened:
        numbers = np.array([names.index(name) for name in images.class_names])
        for split, pixels, found in (
            (images.train, features, labels),
            (images.test, tests, truth),
        ):
            pixels.append(extract_features(kept.encoder, split.pixels, backend, 256, 8))
            found.append(numbers[split.labels])
    bank, test = np.concatenate(features), np.concatenate(tests)
    (result,) = run.read_results()
    row = result["rows"][0]
    assert result["test_images"] == len(test)
    predicted = kept.classifier.probabilities(torch.from_numpy(test)).argmax(dim=1).numpy()
    right = int((predicted == np.concatenate(truth)).sum())
    assert abs(right - row["mean"] * len(test)) <= 1  # the central score, but for one image
    weight, bias = kept.classifier.weight.numpy().T, kept.classifier.bias.numpy()
    one_place = Site(bank, np.concatenate(labels), test, np.concatenate(truth), 10)
    assert in_one_place({0: one_place}, Head(weight, bias), test) >= 0.999
