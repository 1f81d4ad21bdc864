"""Sites that are asked by messages: as those in one process, and nonsense named, not added."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import create_run
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from PIL import Image

import utils
from client import ClientConfig, make_client_app, open_labelled, simulated
from fedssl.config.compose import load_config
from fedssl.errors import UserError
from fedssl.evaluation.base import EvaluationData
from fedssl.federation.local_grid import LocalGrid
from fedssl.federation.messages import pack_arrays, read_tensors, unpack_arrays, write_tensors
from fedssl.networks.state import state_digest
from fedssl.runs.checkpoints import Checkpoint, save_checkpoint
from fedssl.runs.encoder_file import CLASSIFIER_FILE, load_encoder
from fedssl.runs.metrics import RoundMetrics
from fedssl.sites.answers import LABELS, answer_labels
from fedssl.sites.evaluation import FederatedEvaluation
from fedssl.sites.remote import Classes
from utils import build_method, evaluate_at_sites, open_evaluation, plain

SITES = 3


def make_run(folder, given):
    """Make a run of one round whose encoder has never trained."""
    config = load_config("config", given)
    run = create_run(folder, config)
    state = build_method(config, torch.device("cpu")).state_dict()
    save_checkpoint(run.checkpoints, Checkpoint(1, state, metrics=RoundMetrics(1)), keep=1)
    return run


@pytest.fixture
def settled(tmp_path, config, digits):
    """A run with a checkpoint, and the configuration that evaluates it at its sites."""
    places = [f"cache_dir={config.cache_dir}", f"output_dir={tmp_path}", "precision=float32"]
    given = [f"num_clients={SITES}", "model.stem=imagenet", *places]
    run = make_run(tmp_path / "run", given)
    federated = ["eval=federated", "eval.seeds=1", "eval.epochs=1", f"run={run.path}"]
    federated += ["eval.baselines=false"]
    return run, load_config("config", [*given, *federated], federated=True)


class Grid(LocalGrid):
    """Sites of a data set that is dealt out; some tamper with what they answer."""

    def __init__(self, config, tamper=None):
        app = make_client_app(simulated(config))
        super().__init__(app, config.num_clients)
        self.tamper, self.sent = tamper, []

    def answer(self, message, context):
        reply = super().answer(message, context)
        step = message.content.config_records.get("config", {}).get("step")
        size = sum(
            len(value)
            for content in (message.content, reply.content)
            for record in content.config_records.values()
            for value in record.values()
            if isinstance(value, bytes | str)
        )
        self.sent.append((step, size))
        if self.tamper and step:
            self.tamper(step, context.node_config["partition-id"], reply)
        return reply


def change(reply, how):
    tensors = read_tensors(reply.content, "tensors")
    how(tensors)
    for name, record in write_tensors(tensors).items():
        reply.content[name] = record


def test_messages_give_the_scores_of_one_process(settled, digits):
    run, config = settled
    config.eval.seeds, config.eval.baselines = 2, True
    grid = Grid(config)
    result = evaluate_at_sites(config, grid)
    trained = run.load_config()
    evaluation, data = open_evaluation(
        config.eval, trained, digits, 1, utils.choose_backend("float32")
    )
    assert isinstance(evaluation, FederatedEvaluation)
    assert isinstance(data, EvaluationData)
    method = build_method(trained, torch.device("cpu"))
    expected = evaluation.run("federated SimCLR", method.encoder, data)
    for ours, theirs in zip(result.rows[:3], expected, strict=False):
        assert (ours.encoder, ours.method, ours.top1) == (
            theirs.encoder,
            theirs.method,
            theirs.top1,
        )
        confusions = [[draw["confusion"] for draw in score.sites] for score in (ours, theirs)]
        assert confusions[0] == confusions[1]
    assert result.test_images == len(digits.test.labels)
    assert result.labelled_images == evaluation.count_labelled(data)
    (recorded,) = run.read_results()
    assert recorded == json.loads(json.dumps(result.to_json()))
    assert [row.encoder for row in result.rows][3:] == ["random encoder"] * 3
    trained_head = load_encoder(run.path / CLASSIFIER_FILE)
    assert list(trained_head.classifier.classes) == digits.class_names
    pixels = np.array(digits.test.pixels)
    features = torch.from_numpy(data.features(trained_head.encoder, pixels))
    predicted = trained_head.classifier.probabilities(features).argmax(dim=1).numpy()
    assert data.top1(predicted) == result.rows[0].top1[0]
    largest = max(size for step, size in grid.sent if step in ("sums", "judge", "test"))
    assert largest <= 2e6  # bytes of a message and its answer, with 512 features


@pytest.mark.usefixtures("narrow")
def test_tuning_by_messages_is_that_of_one_process(settled, digits):
    run, config = settled
    tuning = load_config("config", ["eval=federated_finetune", "eval.label_fraction=0.05"]).eval
    config.eval = tuning
    config.eval.seeds, config.eval.rounds, config.eval.epochs = 2, 2, 1
    config.eval.baselines = False
    said = []
    result = evaluate_at_sites(config, Grid(config), said.append)
    trained = run.load_config()
    backend = utils.choose_backend("float32")
    evaluation, data = open_evaluation(config.eval, trained, digits, 1, backend)
    encoder = build_method(trained, torch.device("cpu")).encoder
    digest = state_digest(encoder)
    expected = evaluation.run("federated SimCLR", encoder, data)
    assert state_digest(encoder) == digest
    names = ["fine-tuned by rounds", "tuned encoder, own head at each site", "head from sums"]
    for ours, theirs, name in zip(result.rows, expected, names, strict=True):
        assert (ours.method, ours.top1) == (name, theirs.top1)
        assert ours.sites == theirs.sites
    left_out = result.rows[0].sites[0]["left_out"]
    assert left_out
    for site, count in left_out.items():
        line = f"partition {site} leaves out {count} of 10 classes, with fewer labelled images"
        assert any(line in each for each in said)
    kept = load_encoder(run.path / CLASSIFIER_FILE)
    assert state_digest(kept.encoder) != digest
    features = torch.from_numpy(data.features(kept.encoder, np.array(digits.test.pixels)))
    predicted = kept.classifier.probabilities(features).argmax(dim=1).numpy()
    assert data.top1(predicted) == result.rows[0].top1[0]


TUNED_NONSENSE = {
    "lost": (lambda arrays: arrays.popitem(), "is missing"),
    "endless": (
        lambda arrays: arrays.update({"head.bias": Array(np.full(10, np.inf, np.float32))}),
        "'head.bias' is not finite",
    ),
    "long": (
        lambda arrays: arrays.update({"head.bias": Array(np.zeros(11, np.float32))}),
        "'head.bias' has shape (11,)",
    ),
}


@pytest.mark.parametrize("kind", TUNED_NONSENSE)
@pytest.mark.usefixtures("narrow")
def test_a_tuned_encoder_that_cannot_be_is_not_averaged(settled, kind):
    _, config = settled
    config.eval = load_config("config", ["eval=federated_finetune"]).eval
    config.eval.seeds, config.eval.rounds, config.eval.epochs = 1, 1, 1
    config.eval.baselines = False
    how, message = TUNED_NONSENSE[kind]
    said = []

    def tamper(step, site, reply):
        if (step, site) == ("tune", 1):
            arrays = dict(unpack_arrays(reply.content["arrays"]))
            how(arrays)
            reply.content["arrays"] = pack_arrays(ArrayRecord(arrays))

    result = evaluate_at_sites(config, Grid(config, tamper), said.append)
    assert any("client 1: " in line and message in line for line in said), said
    assert set(result.rows[0].sites[0]["by_site"]) == {0, 1, 2}  # its test images still count


@pytest.mark.usefixtures("narrow")
def test_a_site_that_lies_is_named_and_left_out(settled):
    _, config = settled
    said = []

    def tamper(step, site, reply):
        if (step, site) == ("sums", 1):
            change(reply, lambda tensors: tensors["gram"].neg_())

    honest = evaluate_at_sites(config, Grid(config))
    result = evaluate_at_sites(config, Grid(config, tamper), said.append)
    assert result.test_images < honest.test_images
    assert result.labelled_images < honest.labelled_images
    assert np.sum(result.rows[0].sites[0]["confusion"]) == result.test_images
    (line,) = [line for line in said if "left out" in line]
    assert "client 1: gram is no sum of squares" in line
    assert set(result.rows[0].sites[0]["by_site"]) == {0, 2}
    assert set(honest.rows[0].sites[0]["by_site"]) == {0, 1, 2}


NONSENSE = (  # site, step, change of the answer, what is said of it
    [
        (2, "judge", lambda t: t["correct"].fill_(10**6), "more correct images than it has"),
        (2, "train", lambda t: t["weight"].fill_(float("nan")), "its head is not finite"),
        (2, "test", lambda t: t["confusion"].neg_(), "confusion holds numbers that can't be"),
        (1, "test", lambda t: [v.mul_(10**9) for v in t.values()], "counts other images than its"),
    ],
    [
        (2, "judge", lambda t: t["surprise"].fill_(float("nan")), "surprise holds numbers that"),
        (2, "train", lambda t: t.pop("weight"), "no weight and bias that fit"),
        (2, "test", lambda t: t["reliability"].mul_(2), "count different images"),
        (1, "test", lambda t: t.pop("reliability"), "reliability has no shape"),
    ],
    [
        (1, "sums", lambda t: t.update(gram=t["gram"].bfloat16()), "unsupported ScalarType"),
        (2, "sums", lambda t: t["counts"].mul_(10**12), "num-examples is"),
    ],
    [(2, "sums", lambda t: t.pop("gram"), "gram is missing")],
)


@pytest.mark.parametrize("changes", NONSENSE, ids=["heads", "shapes", "kinds", "missing"])
@pytest.mark.usefixtures("narrow")
def test_nonsense_is_refused_by_name(settled, changes):
    _, config = settled
    said = []

    def tamper(asked, partition, reply):
        for site, step, how, _ in changes:
            if (asked, partition) == (step, site):
                change(reply, how)

    evaluate_at_sites(config, Grid(config, tamper), said.append)
    for site, _, _, message in changes:
        assert any(f"client {site}: " in line and message in line for line in said), said


ODD_WORDS = {
    "nested": ("[" * 100_000, "the reply names no classes"),
    "many": (json.dumps([str(n) for n in range(10_001)]), "it names 10,001 classes"),
    "control": (json.dumps(["\x1b]0;title\x07"]), "too long or can't be shown"),
    "long": (json.dumps(["x" * 300]), "too long or can't be shown"),
}


@pytest.mark.parametrize("kind", ODD_WORDS)
@pytest.mark.usefixtures("narrow")
def test_odd_names_of_classes_are_refused_by_name(settled, kind):
    _, config = settled
    text, message = ODD_WORDS[kind]
    said = []

    def tamper(step, site, reply):
        if (step, site) == ("classes", 1):
            reply.content.config_records["config"]["classes"] = text

    evaluate_at_sites(config, Grid(config, tamper), said.append)
    assert any("client 1: " in line and message in line for line in said), said
    assert all(line.isprintable() for line in said)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("left-out", [float("inf")], "does not tell which classes it leaves out"),
        ("num-tested", 1e15, "num-tested is 1e+15"),
    ],
)
@pytest.mark.usefixtures("narrow")
def test_odd_counts_are_refused_by_name(settled, name, value, message):
    _, config = settled
    said = []

    def tamper(step, site, reply):
        if (step, site) == ("features", 1):
            reply.content.metric_records["metrics"][name] = value

    evaluate_at_sites(config, Grid(config, tamper), said.append)
    assert any("client 1: " in line and message in line for line in said), said


def test_a_run_of_another_configuration_is_refused(settled):
    _, config = settled
    config.seed = 7
    with pytest.raises(UserError, match="seed was 0, is 7"):
        evaluate_at_sites(config, Grid(config))


def test_a_run_without_an_evaluation_is_refused():
    with pytest.raises(UserError, match=r"run=latest: add eval=federated"):
        load_config("config", ["run=latest"], federated=True)


def draw_folder(folder, rng, classes, count=8):
    """Class folders of images whose class can be seen: bright or dark in one channel."""
    for name, channel in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 60, (8, 8, 3), dtype=np.uint8)
            pixels[..., channel] += 180
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.mark.usefixtures("narrow")
def test_folders_of_sites_meet_by_the_names_of_their_classes(tmp_path, rng, config):
    """One site has two classes, one another spelling and one more, one has no labels."""
    folders = [
        draw_folder(tmp_path / "west", rng, {"red": 0, "green": 1}),
        draw_folder(tmp_path / "east", rng, {"Green": 1, "blue": 2}),
        draw_folder(tmp_path / "bare" / "all", rng, {".": 0}),
    ]
    folders[2] = tmp_path / "bare"
    given = ["dataset=imagefolder", "dataset.image_size=8", "num_clients=3", "precision=float32"]
    given += [f"cache_dir={tmp_path}/cache", f"output_dir={tmp_path}", "model.stem=imagenet"]
    run = make_run(tmp_path / "run", given)
    asked = ["eval=federated", "eval.label_fraction=1", "eval.seeds=1", f"run={run.path}"]
    evaluated = load_config("config", [*given, *asked], federated=True)
    text = utils.OmegaConf.to_yaml(evaluated, resolve=True)

    def identify(context):
        number = context.node_config["partition-id"]
        return ClientConfig(text, number, 0, str(folders[number]))

    grid = LocalGrid(make_client_app(identify), 3)
    result = evaluate_at_sites(evaluated, grid)
    told = result.rows[0].sites[0]
    assert len(told["confusion"]) == 3  # blue, green, red
    assert set(told["by_site"]) == {0, 1}
    assert result.rows[0].mean > 0.6
    assert result.test_images == np.sum(told["confusion"])
    assert plain(evaluated.eval)["label_fraction"] == 1


def test_names_are_compared_without_case_and_spaces_and_near_ones_are_told():
    classes = Classes({0: ["cat", "dog"], 1: ["Cat ", "dog"], 2: ["cats", "dog"]})
    assert classes.keys == ["cat", "cats", "dog"]
    (line,) = classes.describe_oddities(lambda site: f"site {site}")
    assert line == "site 2 has a class 'cats', as no other site has; is it 'cat'?"
    assert Classes({0: ["a"], 1: ["b"]}).describe_oddities(str) == []


def test_no_labels_anywhere_is_a_line(settled, monkeypatch):
    _, config = settled
    open_labelled.cache_clear()
    bare = utils.open_labelled_part

    def without_labels(*given):
        part = bare(*given)
        return SimpleNamespace(
            **{**vars(part), "class_names": [], "labels": np.full_like(part.labels, -1)}
        )

    monkeypatch.setattr("client.open_labelled_part", without_labels)
    with pytest.raises(RuntimeError, match="no site has labelled images"):
        evaluate_at_sites(config, Grid(config))
    open_labelled.cache_clear()


def test_a_site_that_lost_its_features_says_so():
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    asked = RecordDict({"config": ConfigRecord({"step": "test", "draw": 0})})
    with pytest.raises(ValueError, match="lost its features; evaluate once more"):
        answer_labels(Message(asked, 1, LABELS), context, 0, None, None, None)
