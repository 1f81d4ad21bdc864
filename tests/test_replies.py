"""What the replies of a node carry: numbers, weights and sums; no image, file or folder."""

import copy

import numpy as np
import pytest
from conftest import create_run
from omegaconf import OmegaConf
from PIL import Image

from client import ClientConfig, make_client_app
from fedssl.config.compose import load_config
from fedssl.federation.local_grid import LocalGrid
from fedssl.federation.messages import BUFFERS, count_bytes, unpack_tensors
from utils import evaluate_at_sites, run_rounds

pytestmark = pytest.mark.usefixtures("narrow")

PATIENT, CLINIC, CLASSES = "Meier-Anna", "clinic-west", ("benign", "malignant")
MODEL = {"arrays", "buffers", "metrics"}
TRAINED = {"partition-id", "num-examples", "train-loss", "images", "images-per-second"}
EVALUATED = {"partition-id", "num-examples", "eval-loss", "alignment", "uniformity"}
COUNTED = {"num-examples", "num-tested"}
# By kind of message and step: the records of a reply, its metrics, the arrays beside the model's.
EXPECTED = {
    ("query", ""): ({"metrics"}, {"partition-id"}, set()),
    ("train", ""): (MODEL, {*TRAINED, "cores", "unreadable-images"}, None),
    ("evaluate", ""): (
        {"metrics", "buffers"},
        {*EVALUATED, "effective-rank"},
        {"mean", "covariance"},
    ),
    ("query.statistics", ""): ({"metrics", "buffers"}, {"partition-id", "num-examples"}, None),
    ("query", "masked"): ({"metrics"}, {"partition-id"}, set()),
    ("query.secure_keys", "masked"): (
        {"metrics", "config"},
        {"partition-id", "num-examples"},
        None,
    ),
    ("query.secure_shares", "masked"): ({"config"}, set(), None),
    ("train", "masked"): (MODEL, {*TRAINED, "cores", "unreadable-images", "numbers-cut"}, None),
    ("query.secure_unmask", "masked"): ({"config"}, set(), None),
    ("evaluate", "masked"): ({"metrics"}, {*EVALUATED, "effective-rank"}, None),
    ("query.labels", "classes"): ({"metrics", "config"}, COUNTED, set()),
    ("query.labels", "features"): ({"metrics"}, {*COUNTED, "left-out"}, set()),
    ("query.labels", "sums"): ({"buffers"}, set(), {"counts", "totals", "gram"}),
    ("query.labels", "judge"): ({"buffers"}, set(), {"correct", "surprise"}),
    ("query.labels", "train"): ({"buffers"}, set(), {"weight", "bias"}),
    ("query.labels", "test"): ({"buffers"}, set(), {"confusion", "reliability"}),
    ("query.labels", "test-own"): ({"buffers"}, set(), {"confusion", "reliability"}),
    ("query.labels", "tune"): ({"arrays", "metrics"}, {"num-examples"}, set()),
}


class Listening(LocalGrid):
    """Keeps all replies as they leave the nodes."""

    def __init__(self, clients, num_partitions):
        super().__init__(clients, num_partitions)
        self.replies, self.run = {}, ""

    def answer(self, message, context):
        reply = super().answer(message, context)
        config = message.content.config_records.get("config", {})
        step = config.get("step", self.run)
        kind = message.metadata.message_type, str(step)
        self.replies.setdefault(kind, []).append(copy.deepcopy(reply.content))
        return reply


@pytest.fixture
def heard(tmp_path, rng):
    """All replies of a small federation of folders: training, statistics, labels, tuning."""
    folders, images = [], []
    for site in range(2):
        folder = tmp_path / f"{CLINIC}-{site}"
        for split, count in (("train", 12), ("test", 3)):
            for name in CLASSES:
                (folder / split / name).mkdir(parents=True)
                for number in range(count):
                    pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                    images.append(pixels)
                    file = folder / split / name / f"{PATIENT}-{number:02}.png"
                    Image.fromarray(pixels).save(file)
        folders.append(folder)
    given = ["dataset=imagefolder", "dataset.image_size=8", "num_clients=2", "num_rounds=1"]
    given += ["optimizer=muon_averaged", "train.statistics=recomputed", "train.batch_size=4"]
    given += ["train.global_statistics_from=0", "method.shared_negatives=1", "train.max_steps=1"]
    given += ["precision=float32", "model.stem=imagenet", f"cache_dir={tmp_path}/cache"]
    given += [f"output_dir={tmp_path}", "train.local_epochs=1"]
    config = load_config("config", given, federated=True)
    text = OmegaConf.to_yaml(config, resolve=True)

    def identify(context):
        number = int(context.node_config["partition-id"])
        return ClientConfig(text, number, 0, str(folders[number]))

    grid = Listening(make_client_app(identify), 2)
    run = create_run(tmp_path / "run", config)
    run_rounds(config, grid, run, None, lambda metrics: None)
    masks = ["secure_aggregation=true", "train.statistics=averaged", "method.shared_negatives=0"]
    hidden = load_config("config", [*given, *masks], federated=True)
    text = OmegaConf.to_yaml(hidden, resolve=True)
    grid.run = "masked"
    run_rounds(hidden, grid, create_run(tmp_path / "hidden", hidden), None, lambda metrics: None)
    grid.run = ""
    text = OmegaConf.to_yaml(config, resolve=True)
    for protocol in ("eval=federated", "eval=federated_finetune"):
        asked = [protocol, "eval.label_fraction=1", "eval.seeds=1", "eval.epochs=1"]
        asked += ["eval.baselines=false", f"run={run.path}"]
        evaluate_at_sites(load_config("config", [*given, *asked], federated=True), grid)
    return grid.replies, images, tmp_path


def number(value):
    return isinstance(value, int | float)


def test_replies_carry_what_the_server_needs_and_no_more(heard):
    replies, images, folder = heard
    assert replies.keys() == EXPECTED.keys()
    for kind, contents in replies.items():
        records, metrics, arrays = EXPECTED[kind]
        for content in contents:
            assert set(content) == records, kind
            assert set(content.get("metrics", {})) == metrics, kind
            if arrays is not None and BUFFERS in content:
                assert set(unpack_tensors(content[BUFFERS][BUFFERS])) == arrays, kind
    told = {
        str(value)
        for content in replies["query.labels", "classes"]
        for value in content.config_records["config"].values()
    }
    assert told == {'["benign", "malignant"]'}  # the one thing in words, and asked for

    secrets = [PATIENT, CLINIC, str(folder), folder.name, ".png"]
    secrets = [text.encode() for text in secrets] + [pixels.tobytes() for pixels in images]
    secrets += [np.moveaxis(pixels, -1, 0).tobytes() for pixels in images]
    for kind, contents in replies.items():
        for content in contents:
            sent = [
                array.data for record in content.array_records.values() for array in record.values()
            ]
            records = (*content.config_records.values(), *content.metric_records.values())
            values = [value for record in records for value in record.values()]
            parts = [p for value in values for p in (value if isinstance(value, list) else [value])]
            sent += [p if isinstance(p, bytes) else p.encode() for p in parts if not number(p)]
            assert count_bytes(content) == sum(map(len, sent)) + 8 * sum(map(number, parts))
            for data in sent:
                assert not any(secret in data for secret in secrets), kind
