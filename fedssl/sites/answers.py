"""What a site answers when it is asked about its labels: a step at a time.

The first step, "classes", tells the names of the classes and how many images have one. The
second, "features", brings the encoder; the features that it gives stay in Flower's
`context.state` for the steps that follow, which need no encoder any more: "sums",
"judge", "train", "test" and "test-own", see `Site`. The step "tune" stands alone: it brings
an encoder with its head, and takes them back tuned.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor

from fedssl.data.sources.base import NO_LABEL
from fedssl.federation.messages import (
    ARRAYS,
    CONFIG,
    METRICS,
    read_array_record,
    read_tensors,
    write_tensors,
)
from fedssl.sites.site import HeadSettings, Site, TuneSettings, draw_at_site, head_generator
from fedssl.sites.sums import Head, leave_out_rare

ACTION = "labels"
LABELS = f"query.{ACTION}"  # type of all messages about labels
STEP, CLASSES, DRAW, SETTINGS = "step", "classes", "draw", "settings"  # in the config record
FEATURES = "labelled-features"  # in `context.state`
WEIGHT, BIAS = "weight", "bias"  # arrays of a head, or of several, one behind the other


@dataclass(frozen=True)
class LabelledPart:
    """The labelled images of one site.

    Attributes:
        pixels, test_pixels: uint8 (N, 3, S, S), of all that the site can see.
        labels, test_labels: int64 (N,), indices of class_names, or `NO_LABEL`.
        rows, test_rows: which of them are the site's own, int64.
    """

    pixels: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    test_pixels: np.ndarray
    test_labels: np.ndarray
    test_rows: np.ndarray
    class_names: Sequence[str]


Metrics = dict[str, int | float | list[int] | list[float]]  # as Flower has them
State = Mapping[str, Tensor]
Encode = Callable[[State, np.ndarray], np.ndarray]  # state, pixels -> features
# state of a `Classifying`, pixels, labels, settings, seed, round -> its state after the round
Tune = Callable[[State, np.ndarray, np.ndarray, TuneSettings, int, int], State]


def answer_labels(
    message: Message,
    context: Context,
    site: int,
    open_part: Callable[[], LabelledPart],
    encode: Encode,
    tune: Tune,
) -> RecordDict:
    """Answer a step.

    Args:
        site: its number.
        open_part: opens its labelled images, which most steps need not.
        encode: gives float32 (N, D) of uint8 (N, 3, S, S) by an encoder with some state.
        tune: trains for a round, see `tune_at_site`.

    Raises:
        ValueError: an unknown step, or one whose features are gone.
    """
    request = message.content.config_records[CONFIG]
    step = str(request[STEP])
    if step == "classes":
        return _tell_classes(open_part())
    if step == "features":
        state = read_array_record(message.content)
        return _keep_features(
            request, context, site, open_part(), lambda pixels: encode(state, pixels)
        )
    if step == "tune":
        return _tune(request, site, open_part(), read_array_record(message.content), tune)
    draw = int(str(request[DRAW]))
    here = _site_of(context, draw)
    if step == "sums":
        return write(here.sums().pack())
    heads = read_heads(message.content)
    if step == "judge":
        judged = here.judge(heads)
        return write({"correct": judged.correct[None], "surprise": judged.surprise[None]})
    if step == "test":
        tested = here.test(heads)
        names = ("confusion", "reliability")
        return write({name: np.stack([getattr(each, name) for each in tested]) for name in names})
    if step == "test-own":
        (own,) = here.test([here.own_head() or heads[0]])
        return write({"confusion": own.confusion[None], "reliability": own.reliability[None]})
    if step != "train":
        raise ValueError(f"step={step}: unknown to this version")
    given = read_arrays(message.content, "head")
    epoch, seed = int(str(request["epoch"])), int(str(request["seed"]))
    settings = HeadSettings(**json.loads(str(request[SETTINGS])))
    trained = here.train(
        heads[0],
        given["mean"],
        given["scale"],
        settings,
        epoch,
        head_generator(seed, epoch, site),
    )
    return write(stack_heads([trained]))


def _tell_classes(part: LabelledPart) -> RecordDict:
    labels, tests = part.labels[part.rows], part.test_labels[part.test_rows]
    counts: Metrics = {"num-examples": int((labels != NO_LABEL).sum())}
    counts["num-tested"] = int((tests != NO_LABEL).sum())
    told = ConfigRecord({CLASSES: json.dumps(list(part.class_names))})
    return RecordDict({METRICS: MetricRecord(counts), CONFIG: told})


def _keep_features(
    request: ConfigRecord,
    context: Context,
    site: int,
    part: LabelledPart,
    encode: Callable[[np.ndarray], np.ndarray],
) -> RecordDict:
    """Encode the images whose labels some draw gives, and the test images."""
    classes, own = _number_classes(request, part)
    labels = _translate(part.labels[part.rows], own)
    fraction, seeds = float(str(request["fraction"])), json.loads(str(request["seeds"]))
    draws = [draw_at_site(labels, fraction, seed, site) for seed in seeds]
    rows = np.unique(np.concatenate(draws))
    kept = {
        "features": _encode_some(encode, part.pixels, part.rows[rows]),
        "labels": labels[rows],
        "test-features": _encode_some(encode, part.test_pixels, part.test_rows),
        "test-labels": _translate(part.test_labels[part.test_rows], own),
        "settings": np.array([classes, int(str(request["min-images"]))]),
    }
    if not all(np.isfinite(value).all() for value in kept.values()):
        raise ValueError("features are not finite")
    for number, drawn in enumerate(draws):
        kept[f"draw-{number}"] = np.searchsorted(rows, drawn)
    context.state[FEATURES] = ArrayRecord({k: torch.from_numpy(v) for k, v in kept.items()})
    left_out = [len(_site_of(context, number).left_out) for number in range(len(draws))]
    tested = int((kept["test-labels"] != NO_LABEL).sum())
    counts: Metrics = {"num-examples": len(draws[0]), "num-tested": tested}
    return RecordDict({METRICS: MetricRecord({**counts, "left-out": left_out})})


def _tune(
    request: ConfigRecord, site: int, part: LabelledPart, state: State, tune: Tune
) -> RecordDict:
    """Tune an encoder with its head on the images whose labels a draw gives."""
    classes, own = _number_classes(request, part)
    labels = _translate(part.labels[part.rows], own)
    seed, round_number = int(str(request["seed"])), int(str(request["tune-round"]))
    drawn = draw_at_site(labels, float(str(request["fraction"])), seed, site)
    drawn = drawn[leave_out_rare(labels[drawn], classes, int(str(request["min-images"])))[0]]
    metrics = MetricRecord({"num-examples": len(drawn)})
    if not len(drawn):
        return RecordDict({METRICS: metrics})
    settings = TuneSettings(**json.loads(str(request[SETTINGS])))
    pixels = np.asarray(part.pixels[part.rows[drawn]])
    tuned = tune(state, pixels, labels[drawn], settings, seed, round_number)
    return RecordDict({ARRAYS: ArrayRecord(dict(tuned)), METRICS: metrics})


def _number_classes(request: ConfigRecord, part: LabelledPart) -> tuple[int, list[int]]:
    """Give the number of the federation's classes, and what it numbers this site's by."""
    number_of = {name: number for number, name in enumerate(json.loads(str(request[CLASSES])))}
    return len(number_of), [number_of.get(normalize(name), NO_LABEL) for name in part.class_names]


def _encode_some(
    encode: Callable[[np.ndarray], np.ndarray], pixels: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """Encode some images; of none the features have no numbers."""
    return encode(pixels[rows]) if len(rows) else np.zeros((0, 0), dtype=np.float32)


def _translate(labels: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
    """Turn a site's own class numbers into those of the federation."""
    known = labels != NO_LABEL
    translated = np.full_like(labels, NO_LABEL)
    translated[known] = np.array(numbers, dtype=np.int64)[labels[known]]
    return translated


def _site_of(context: Context, draw: int) -> Site:
    """Put together what the site kept, for a draw of labels.

    Raises:
        ValueError: it is gone.
    """
    record = context.state.array_records.get(FEATURES)
    if record is None:
        raise ValueError("it was started again and lost its features; evaluate once more")
    kept = {name: value.numpy() for name, value in record.items()}
    rows, (classes, least) = kept[f"draw-{draw}"], kept["settings"]
    size = max(kept["features"].shape[1], kept["test-features"].shape[1])
    bank, test = (
        value if value.shape[1] == size else np.zeros((0, size), dtype=np.float32)
        for value in (kept["features"], kept["test-features"])
    )
    given = bank[rows], kept["labels"][rows], test, kept["test-labels"]
    return Site.of(*given, int(classes), int(least))


def write(arrays: Mapping[str, np.ndarray]) -> RecordDict:
    """Put arrays into the content of a message."""
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
    return RecordDict({**write_tensors(tensors)})


def read_arrays(content: RecordDict, what: str) -> dict[str, np.ndarray]:
    """Read what `write` wrote.

    Args:
        what: to call it where it is missing.

    Raises:
        ValueError: it is missing, or something else.
    """
    try:
        return {name: value.numpy() for name, value in read_tensors(content, what).items()}
    except TypeError as error:  # a dtype that NumPy does not know
        raise ValueError(f"{what}: {error}") from error


def stack_heads(heads: Sequence[Head]) -> dict[str, np.ndarray]:
    """Stack heads for a message: weights (heads, D, C) and biases (heads, C)."""
    return {name: np.stack([getattr(head, name) for head in heads]) for name in (WEIGHT, BIAS)}


def read_heads(content: RecordDict) -> list[Head]:
    """Read what `stack_heads` made.

    Raises:
        ValueError: it is something else.
    """
    given = read_arrays(content, "head")
    weights, biases = given.get(WEIGHT, np.array(0)), given.get(BIAS, np.array(0))
    if weights.ndim != 3 or weights.shape[::2] != biases.shape:
        raise ValueError("its head has no weight and bias that fit")
    return list(map(Head, weights, biases))


def normalize(name: str) -> str:
    """Give the form by which class names are compared: no case, no spaces around."""
    return " ".join(name.split()).casefold()
