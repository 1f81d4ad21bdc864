"""The page of a run, also as a browser shows it, and TensorBoard's curves."""

import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from conftest import CPU, create_run, narrow_resnets
from federation.shuffled import FAST, ShuffledGrid
from runs.test_metrics import EVENTS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedssl.compute import Backend
from fedssl.config.compose import load_config
from fedssl.data.image_set import Images, ImageSet
from fedssl.errors import UserError
from fedssl.evaluation.features import extract_features
from fedssl.reporting import sections as pictures
from fedssl.reporting.figures import (
    MAX_NAMES,
    draw_map,
    draw_neighbours,
    draw_partitions,
    drawable,
)
from fedssl.reporting.page import describe_privacy, describe_results, table_of_rounds
from fedssl.reporting.sections import picture_map, picture_partitions
from fedssl.runs.directory import RunDirectory
from fedssl.runs.metrics import NOT_COVERED, Failure, RoundMetrics
from main import try_report
from scripts.report import prepare
from utils import build_method, evaluate_run, report_run, run_facts, run_images, run_rounds

REASON = "<script>alert('no')</script> & so on"


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        narrow_resnets(patch)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache_dir, digits):
    """A run of two rounds and three clients, and how many rounds TensorBoard saw in each."""
    folder = tmp_path_factory.mktemp("report")
    given = ["num_clients=3", "num_rounds=2", "train.local_epochs=1", "train.max_steps=1", FAST]
    given += ["precision=float32", "num_cpus=1", f"cache_dir={cache_dir}", f"output_dir={folder}"]
    config = load_config("config", [*given, "eval.seeds=1", "partition=dirichlet"])
    run = create_run(folder / "run", config, given)
    shown = []

    def look(metrics):
        shown.append(len(read_events(run).Scalars("train_loss")))

    run_rounds(config, ShuffledGrid(config), run, digits, look)
    first, second = run.read_metrics()
    failures = Failure(2, REASON), Failure(1, "no memory", "south")
    run.write_metrics([first, replace(second, failures=failures, nodes=EVENTS)])
    evaluate_run(run, config, config.eval, digits, run.last_checkpoint())
    report_run(run, config, config.figures, digits)
    return run, config, shown


def read_events(run):
    events = EventAccumulator(str(run.path))
    events.Reload()
    return events


@pytest.fixture
def page(finished):
    return finished[0].report.read_text()


def test_the_page_holds_the_runs_numbers_settings_and_origin(finished, page):
    run, _, _ = finished
    (result,) = run.read_results()
    for row in result["rows"]:
        assert f"{100 * row['mean']:.1f} %" in page
    for metrics in run.read_metrics():
        assert f"<td>{metrics.train_loss:.3f}</td>" in page
        assert f"<td>{metrics.bytes_moved / 1e6:,.0f} MB</td>" in page
    for heading in ("train loss", "uniformity", "images/s", "moved"):
        assert f"<th>{heading}</th>" in page
    commit = result["measured"]["commit"] or "unknown"  # as in a copy without git's history
    for text in (commit, "scikit-learn", "train.max_steps", "DirichletPart"):
        assert text in page
    assert page.count("data:image/png;base64,") == 6
    assert "Left out" not in page


def test_epsilon_stands_with_what_it_does_not_cover(page):
    assert "epsilon" not in page
    private = RoundMetrics(2, epsilon=2.5, delta=1e-5)
    told = describe_privacy(private)
    assert "epsilon 2.50 at delta 1e-05" in told["promise"]
    assert told["not_covered"] == NOT_COVERED
    head, line = table_of_rounds([private])
    assert dict(zip(head, line, strict=True))["epsilon"] == "2.50"


def test_the_page_tells_which_nodes_came_and_went(page):
    told = re.findall(r"<tr><td>(\d)</td><td>(.*?)</td></tr>", page.partition("<h2>Nodes")[2])
    assert told[: 1 + len(EVENTS)] == [
        ("1", "joined: partition 0, partition 1, partition 2"),
        ("2", "joined: partition 0"),
        *(("2", str(event)) for event in EVENTS[1:]),
    ]
    assert "<td>south failed: no memory</td>" in page


def test_what_clients_say_is_text_and_no_markup(page):
    assert "<script" not in page
    assert "&lt;script&gt;alert" in page


def test_the_page_needs_nothing_else(page):
    assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!data:)[\w/.]""", page)
    assert "http:" not in page
    assert "https:" not in page


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium in PATH")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(finished, tmp_path, width):
    with Browser() as browser:
        browser.open(finished[0].report.as_uri(), width, mobile=width < 500, dark=width < 500)
        inner, full = browser.evaluate("[innerWidth, document.documentElement.scrollWidth]")
        shown = browser.evaluate("[...document.images].map(i => i.complete && i.naturalWidth)")
        clipped = browser.evaluate(
            "[...document.querySelectorAll('img, p, h1, .table')].filter("
            "e => e.getBoundingClientRect().right > innerWidth).length"
        )
        browser.screenshot(tmp_path / "page.png")
    assert (inner, clipped) == (width, 0)
    assert full <= width
    assert len(shown) == 6
    assert all(shown)
    assert (tmp_path / "page.png").stat().st_size > 50_000
    asked = [e["params"]["request"]["url"] for e in browser.events if "request" in e["params"]]
    assert asked
    assert all(url.startswith(("file:", "data:")) for url in asked)
    noisy = {"Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"}
    assert not noisy & {event["method"] for event in browser.events}


def test_tensorboard_holds_the_numbers_of_every_round(finished):
    events = read_events(finished[0])
    rounds = finished[0].read_metrics()

    def read(tag):
        return [(event.step, event.value) for event in events.Scalars(tag)]

    for name in ("train_loss", "eval_loss", "knn", "effective_rank", "uniformity", "alignment"):
        expected = [(m.round, pytest.approx(getattr(m, name), rel=1e-6)) for m in rounds]
        assert read(name) == expected
    for name in ("train_loss", "eval_loss", "update_norm"):
        for number in range(3):
            expected = [(m.round, pytest.approx(getattr(m.clients[number], name))) for m in rounds]
            assert read(f"client_{name}/{number}") == expected


def test_every_round_reaches_tensorboard_before_the_next(finished):
    assert finished[2] == [1, 2]


def settings_for(finished, *overrides):
    run, config, _ = finished
    return load_config("report", [f"run={run.path}", f"cache_dir={config.cache_dir}", *overrides])


def test_a_run_opens_with_its_own_images(finished):
    run, config, image_set = prepare(settings_for(finished))
    assert (run.path, config.seed) == (finished[0].path, 0)
    assert len(image_set.test.pixels) == 360


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.yaml", None, "no config.yaml"),
        ("config.yaml", "a: [", "can't be read"),
        ("config.yaml", "a: 1", "holds no 'dataset'"),
        ("config.yaml", "just text", "holds no 'dataset'"),
        ("metrics.jsonl", None, "no finished round"),
        ("metrics.jsonl", '{"round": 1}\n', "line 1 is no round"),
        ("metrics.jsonl", "[1]\n", "line 1 is no round"),
        ("checkpoints/round-0002.json", None, "no checkpoint"),
    ],
)
def test_what_is_missing_or_damaged_gets_one_line(finished, tmp_path, name, text, message):
    run = finished[0]
    for part in ("config.yaml", "metrics.jsonl", "checkpoints/round-0002.json"):
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        (tmp_path / part).write_bytes((run.path / part).read_bytes())
    (tmp_path / "checkpoints" / "round-0002.safetensors").touch()
    (tmp_path / name).unlink()
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        prepare(settings_for(finished, f"run={tmp_path}"))
    assert "\n" not in str(error.value)


def test_images_that_moved_are_asked_for(finished, tmp_path):
    with pytest.raises(UserError, match=r"no such folder.*add path=DIR"):
        prepare(settings_for(finished, f"path={tmp_path}/none"))


def test_without_labels_the_page_says_what_it_leaves_out(finished, digits, tmp_path):
    run, config, _ = finished
    bare = ImageSet(Images(digits.train.pixels, None), None, [], [], "bare", "", "bare")
    other = create_run(tmp_path / "run", config)
    few = load_config("config", [*run.read_overrides(), "figures.map_images=30"])
    other.write_metrics([replace(metrics, knn=None) for metrics in run.read_metrics()])
    for file in run.checkpoints.glob("round-0002.*"):
        (other.checkpoints / file.name).write_bytes(file.read_bytes())
    report_run(other, few, few.figures, bare)
    page = other.report.read_text()
    assert page.count("Left out") == 3  # kNN, map, partitions
    assert "29 others" in page
    assert "Training images" in page
    assert "Not evaluated" in page
    report_run(other, config, config.figures, None)  # the clients alone have images
    assert other.report.read_text().count("Left out") == 4


def test_a_failing_report_costs_no_results(finished, digits, monkeypatch, capsys):
    run, config, _ = finished
    before = run.report.read_bytes()
    monkeypatch.setattr(pictures, "TSNE", lambda **settings: 1 / 0)
    try_report(config, digits, run)
    assert "no report (ZeroDivisionError" in capsys.readouterr().out
    assert run.report.read_bytes() == before


def test_the_partitions_shown_are_those_the_clients_held(finished, digits, tmp_path):
    run, config, _ = finished
    facts, images = run_facts(config), run_images(run, config, digits)
    first, second = run.read_metrics()
    picture = picture_partitions(facts, [first, second], images, tmp_path / "a.png")
    assert picture.file.is_file()
    assert "1,437 training images, dealt out to 3 clients" in picture.caption
    one, *others = first.clients
    more = replace(one, num_examples=one.num_examples + 1)  # a node with a folder of its own
    rounds = [replace(first, clients=(more, *others)), second]
    assert picture_partitions(facts, rounds, images, tmp_path / "b.png").file is None


def test_a_map_keeps_apart_what_is_apart():
    rng = np.random.default_rng(0)
    centres = np.repeat(np.eye(3, 16), 20, axis=0)
    features = (centres + 0.05 * rng.normal(size=(60, 16))).astype(np.float32)
    points, trust = pictures.lay_out(features, perplexity=10, seed=0)
    again, _ = pictures.lay_out(features, perplexity=10, seed=0)
    assert np.array_equal(points, again)
    assert trust > 0.8
    distances = np.linalg.norm(points[:, None] - points, axis=2) + np.diag([np.inf] * 60)
    assert (distances.argmin(axis=1) // 20 == np.arange(60) // 20).all()


def test_a_map_of_many_classes_has_a_scale_of_their_numbers(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "fedssl.reporting.figures.save_figure", lambda figure, file: drawn.append(figure)
    )
    points, labels = np.zeros((30, 2), dtype=np.float32), np.arange(30)
    for count in (MAX_NAMES, MAX_NAMES + 1):
        names = [f"class {n}" for n in range(count)]
        draw_map({"before": points, "after": points}, labels % count, names, "map.png")
    few, many = drawn
    assert (len(few.axes), len(few.legends)) == (2, 1)
    assert (len(many.axes), len(many.legends)) == (3, 0)
    assert many.axes[2].get_xlim() == (0, MAX_NAMES)


def test_names_with_dollar_signs_are_no_formulas(tmp_path, rng):
    points, labels = rng.random((30, 2), dtype=np.float32), np.arange(30) % 3
    names = ["$0_$10", "$", "a_{b}$\\x$"]
    draw_map({"$x_$": points, "after": points}, labels, names, tmp_path / "map.png")
    draw_partitions(np.arange(6).reshape(2, 3), names, tmp_path / "partitions.png")
    pixels = rng.integers(0, 256, (12, 3, 8, 8), dtype=np.uint8)
    captions = ["$0_$10"] * 12
    draw_neighbours(pixels, rng.random((12, 4)), tmp_path / "near.png", [0, 1], captions)
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_the_map_shows_the_baseline_and_the_trained_encoder(finished, digits, tmp_path):
    run, config, _ = finished
    images = run_images(run, config, digits)
    encoded = pictures.encode_some(images, 40, config.seed)
    assert encoded.before.shape == encoded.after.shape == (40, 64)
    untrained, backend = build_method(config, CPU).encoder, Backend(CPU, torch.float32)
    expected = extract_features(untrained, encoded.pixels, backend, 256, 8)
    np.testing.assert_allclose(encoded.before, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(encoded.before - encoded.after).max() > 1e-3
    picture = picture_map(30, config.seed, encoded, digits.class_names, tmp_path / "map.png")
    assert "40 test images" in picture.caption
    assert "perplexity 13" in picture.caption  # a third of the images at most


def test_letters_that_the_font_lacks_print_nothing(tmp_path, recwarn, capfd):
    counts = np.array([[3, 1], [2, 2]])
    draw_partitions(counts, ["猫", "\x1b"], tmp_path / "dealt.png")
    assert (tmp_path / "dealt.png").is_file()
    assert [str(each.message) for each in recwarn if "Glyph" in str(each.message)] == []
    assert capfd.readouterr().err == ""


def test_names_that_the_font_lacks_are_numbers_and_no_name_is_lost(tmp_path, rng, monkeypatch):
    names = ["_under", "new\nline", "日本", "שלום", "\u202etxt", "\t"]
    written = ["_under", "new line", "class 5", "שלום", "txt", "class 0"]
    assert drawable(names) == written
    assert drawable([None, "日本", "日本", ""]) == ["", "class 0", "class 0", ""]
    points, labels = rng.random((30, 2), dtype=np.float32), np.arange(30) % len(names)
    drawn = []
    save = "fedssl.reporting.figures.save_figure"
    with monkeypatch.context() as patched:
        patched.setattr(save, lambda figure, file: drawn.append(figure))
        draw_map({"before": points, "after": points}, labels, names, tmp_path / "map.png")
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.texts] == written
    with warnings.catch_warnings(action="error"):
        draw_map({"日本": points, "after": points}, labels, names, tmp_path / "map.png")
        draw_partitions(np.ones((2, 6), dtype=int), names, tmp_path / "partitions.png")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[[", "damaged"),
        ("{}", "no list"),
        ("[" * 100_000, "damaged"),
        ('[{"rows": 5}]', "entry 1 is no evaluation"),
        ('[{"rows": []}]', "KeyError: 'protocol'"),
        ('[{"protocol": {"label_fraction": 1}, "rows": [{"encoder": "a"}]}]', "KeyError: 'std'"),
        (
            '[{"protocol": {"label_fraction": 1}, "rows": [{"encoder": "a", "method": "b", '
            '"mean": 1}]}]',
            "KeyError: 'std'",
        ),
    ],
)
def test_damaged_results_get_one_line(tmp_path, text, message):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        describe_results(RunDirectory(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["a: [", "5", "seed: 3", "\x00"])
def test_damaged_overrides_get_one_line(tmp_path, text):
    (tmp_path / "overrides.yaml").write_text(text)
    with pytest.raises(UserError, match=r"overrides\.yaml: damaged") as error:
        RunDirectory(tmp_path).read_overrides()
    assert "\n" not in str(error.value)
