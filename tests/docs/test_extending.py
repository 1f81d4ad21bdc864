"""The recipes of docs/extending.md: each is put in place as written, and used."""

import re
import shutil
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hydra.core.config_store import ConfigStore
from samples import BACKEND

from fedssl.config import compose, options, schema, sections
from fedssl.config.compose import load_config
from fedssl.config.evaluation import follow_run
from fedssl.data.image_set import Images, ImageSet
from fedssl.errors import UserError
from fedssl.evaluation.protocol import evaluate
from fedssl.federation.aggregation import build_strategy
from fedssl.federation.strategy_state import load_strategy_state_dict, strategy_state_dict
from fedssl.networks.state import state_digest
from fedssl.reporting import console
from fedssl.runs import metrics
from fedssl.runs.metrics import RoundMetrics, Where
from utils import build_method, open_evaluation, open_images, open_source, plain

# Flower sets these before it runs an app; a message can't be made without them.
TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
PAGE = (ROOT / "docs" / "extending.md").read_text()


def recipe(title):
    """Give the blocks of code of a section, each with the words before it."""
    section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return re.findall(r"([^\n]+):\n\n```\w+\n(.*?)```", section, re.DOTALL)


@pytest.fixture
def put(monkeypatch, tmp_path):
    """Put a recipe in place, until the end of the test: code as modules, the rest in copies."""
    conf = tmp_path / "conf"
    shutil.copytree(ROOT / "conf", conf)
    for module in (compose, options):
        monkeypatch.setattr(module, "CONF", conf)
    options.model_of_option.cache_clear()
    store = ConfigStore.instance().repo["schema"]
    before = dict(store)

    def put_recipe(title):
        for words, code in recipe(title):
            file, group = re.fullmatch(r".*?`([\w/.]+?)(?:\[\"(\w+)\"\])?`", words).groups()
            if file.startswith("conf/"):
                (tmp_path / file).write_text(code)
            elif words.startswith("A class of"):
                names = {**vars(sections), "__name__": sections.__name__}
                earlier = set(names)
                exec(code, names)
                for name in names.keys() - earlier:
                    monkeypatch.setattr(sections, name, names[name], raising=False)
            elif group:
                models = eval(f"{{{code}}}", {"sections": sections})
                for target, model in models.items():
                    monkeypatch.setitem(schema.GROUPS[group].models, target, model)
            elif file == "EVALUATIONS":
                for mode, heading in eval(f"{{{code}}}").items():
                    monkeypatch.setitem(console.EVALUATIONS, mode, heading)
            else:
                put_module(file, code)
        schema.store_defaults()

    def put_module(file, code):
        name = file.removesuffix(".py").replace("/", ".")
        folder = ROOT / file.rpartition("/")[0]
        if not folder.is_dir():  # the first file of a package
            monkeypatch.setitem(sys.modules, name.rpartition(".")[0], package(name))
        module = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(code, file, "exec"), vars(module))

    def package(name):
        made = ModuleType(name.rpartition(".")[0])
        made.__path__ = []
        return made

    yield put_recipe
    store.clear()
    store.update(before)
    options.model_of_option.cache_clear()


def random_images(rng, count, classes=3):
    labels = np.arange(count) % classes
    pixels = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return pixels, labels


def test_the_files_of_a_recipe_are_those_that_it_shows():
    for title in re.findall(r"^## (.+)$", PAGE, re.MULTILINE):
        section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
        rows = "\n".join(line for line in section.splitlines() if line.startswith("| `"))
        listed = set(re.findall(r"`((?:fedssl|conf)/[\w/.]+)`", rows))
        shown = {word for words, _ in recipe(title) for word in re.findall(r"`(\w+/[^`]+)`", words)}
        assert shown <= listed, title
        for file in listed - shown:
            assert (ROOT / file).is_file(), file


def test_the_method_learns_and_keeps_its_target_to_itself(put):
    put("A method")
    assert len(recipe("A method")[0][1].splitlines()) < 60
    more = ["method.momentum=0.5", "model.deep_supervision=[layer3]"]
    config = load_config("config", ["method=ressl", *more])
    torch.manual_seed(0)
    method = build_method(config, CPU)
    views = torch.rand(8, 3, 8, 8)
    losses = method.loss(views)
    assert losses.reported < losses.total
    assert losses.projections.shape == (8, config.model.projection_size)
    assert not losses.projections.requires_grad
    own, target = torch.eye(4)[[0, 0, 1, 0, 1, 1]], torch.eye(4)[[0, 0, 1, 0, 1, 1]]
    assert method.relate(own, target) < method.relate(own.roll(1, dims=0), target)
    losses.total.backward()
    torch.optim.SGD(method.parameters(), lr=0.1).step()
    slow = [parameter.clone() for parameter in method.target.parameters()]
    method.after_step(0.0)
    heads = [*method.projection_head.parameters(), *method.deep_heads.parameters()]
    online = [*method.encoder.parameters(), *heads]
    for target, before, fast in zip(method.target.parameters(), slow, online, strict=True):
        torch.testing.assert_close(target, (before + fast) / 2)
    method.begin_locally()
    for target, fast in zip(method.target.parameters(), online, strict=True):
        assert torch.equal(target, fast)
    assert method.local_names()
    shared = method.shared_state()
    assert not any(name.startswith("target") for name in shared)
    assert {"encoder.conv1.weight", "projection_head.0.weight"} <= shared.keys()


def test_the_source_gives_images_with_labels(put, tmp_path, rng):
    put("A source of images")
    images, labels = random_images(rng, 30)
    folder = tmp_path / "arrays"
    folder.mkdir()
    np.savez(folder / "images.npz", images=images, labels=labels)
    places = [f"dataset.path={folder}", f"cache_dir={tmp_path}", "dataset.image_size=8"]
    config = load_config("config", ["dataset=npz", *places])
    image_set = open_images(config)
    assert (len(image_set.train.pixels), len(image_set.test.pixels)) == (24, 6)
    assert image_set.class_names == ["0", "1", "2"]
    known = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    for part in (image_set.train, image_set.test):
        found = [known[pixels.transpose(1, 2, 0).tobytes()] for pixels in np.array(part.pixels)]
        assert found == part.labels.tolist()
    source = open_source(config.dataset)
    before = source.fingerprint(0)
    np.savez(folder / "images.npz", images=images[:10], labels=labels[:10])
    assert source.fingerprint(0) != before
    (folder / "images.npz").rename(folder / "other.npz")
    with pytest.raises(UserError, match=r"give a folder with an images\.npz"):
        source.check()


def test_the_strategy_goes_on_where_it_was(put):
    put("A strategy")
    config = load_config("config", ["strategy=ema", "strategy.decay=0.75"])
    strategy, other = (build_strategy(plain(config.strategy)) for _ in range(2))
    assert average(strategy, 1, [0.0, 4.0]) == pytest.approx(2.0)
    load_strategy_state_dict(other, strategy_state_dict(strategy))
    for each in (strategy, other):
        assert average(each, 2, [6.0, 6.0]) == pytest.approx(3.0)
    assert strategy_state_dict(other).tree == strategy_state_dict(strategy).tree


def average(strategy, round_number, values):
    """Let a strategy combine clients that send a value each, from as many images."""
    replies = []
    for node, value in enumerate(values, start=1):
        arrays = ArrayRecord({"w": torch.full((3,), value)})
        content = {"arrays": arrays, "metrics": MetricRecord({"num-examples": 5})}
        replies.append(Message(RecordDict(content), dst_node_id=node, message_type="train"))
    arrays, _ = strategy.aggregate_train(round_number, replies)
    return arrays["w"].numpy().tolist()[0]


def test_the_evaluation_scores_an_encoder_and_leaves_it_alone(put, rng, capsys):
    put("An evaluation")
    config = load_config("config", ["eval=mlp", "eval.label_fraction=0.5", "eval.seeds=2"])
    parts = []
    for count in (48, 12):
        images, labels = random_images(rng, count)
        images[:] = (labels * 100).reshape(-1, 1, 1, 1)  # as different as can be
        parts.append(Images(images.transpose(0, 3, 1, 2), labels))
    image_set = ImageSet(*parts, list("abc"), [], "key", "content", "colours")
    evaluation, data = open_evaluation(config.eval, config, image_set, 1, BACKEND)
    encoder = build_method(config, CPU).encoder
    digest = state_digest(encoder)
    scores = evaluate(evaluation, encoder, encoder, data)
    assert state_digest(encoder) == digest
    assert [len(score.top1) for score in scores] == [2, 2, 2]
    assert scores[0].mean == 1
    assert [score.method for score in scores][:2] == ["small network"] * 2
    rows = [score.to_json() for score in scores]
    shown = {"mode": evaluation.mode, "protocol": evaluation.protocol(), "rows": rows}
    console.print_results(shown | {"labelled_images": 24, "test_images": 12})
    assert "Evaluation by a small network: 50 % of the labels (24)" in capsys.readouterr().out
    settings = load_config("test", ["eval=mlp"])
    follow_run(settings, load_config("config", []))
    assert settings.learning_rate == load_config("config", []).head.learning_rate


def test_the_column_is_in_the_table():
    (_, field), (_, value) = recipe("A column of the round table")
    names = {**vars(metrics), "dataclass": dataclass}
    exec(f"@dataclass(frozen=True)\nclass More(RoundMetrics):\n    {field}", names)
    updates = [SimpleNamespace(update_norm=norm) for norm in (1.0, 2.5)]
    values = {}
    exec(value, {"updates": updates}, values)
    made = names["More"](round=1, **values)
    assert isinstance(made, RoundMetrics)
    assert made.texts(Where.TABLE)["longest"] == "2.50"
    assert made.curves()["longest_update"] == 2.5
    assert "longest" not in made.texts(Where.LOG)
