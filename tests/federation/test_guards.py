"""What a reply must be before it may touch the global model."""

import io
import math
import os

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedssl.federation.guards import (
    Update,
    client_metrics,
    count_images,
    read_update,
    reject_odd_metrics,
    reject_outliers,
    validate_replies,
    weighted_mean,
)
from fedssl.federation.messages import BUFFERS, pack_tensors, write_state
from fedssl.federation.nodes import Answer
from fedssl.runs.metrics import Failure

# Flower sets these before it runs an app; a message can't be made without them.
TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
EXPECTED = {"a": torch.zeros(3), "b": torch.zeros(2)}
SOUND = {"num-examples": 5, "train-loss": 1.0, "images": 5, "images-per-second": 2.0}


def reply(state=EXPECTED, names=("a",), **metrics):
    """Make a training reply; a metric given as None is left out."""
    values = {k: v for k, v in (SOUND | metrics).items() if v is not None}
    content = RecordDict({**write_state(state, names), "metrics": MetricRecord(values)})
    return Message(content, 1, "train")


def evaluation(**metrics):
    """Make the reply to an evaluation."""
    values = {"num-examples": 5, "eval-loss": 1.0, "alignment": 1.0, "uniformity": -1.0}
    values |= {"effective-rank": 3.0} | metrics
    return Message(RecordDict({"metrics": MetricRecord(values)}), 1, "evaluate")


def test_a_sound_update_is_taken():
    update = read_update(4, reply(), EXPECTED)
    assert (update.partition, update.num_examples) == (4, 5)
    assert update.state.keys() == EXPECTED.keys()


@pytest.mark.parametrize("broken", [{"images": None}, {"images": math.nan}, {"images": [1]}])
def test_images_are_counted_where_a_reply_tells_them(broken):
    assert count_images(reply(images=640)) == 640
    assert count_images(reply(**broken)) == 0


STATES = {
    "missing": ({"a": torch.zeros(3)}, "array 'b' is missing"),
    "unknown": (EXPECTED | {"c": torch.zeros(1)}, "array 'c' is unknown"),
    "shape": (EXPECTED | {"a": torch.zeros(3, 1)}, "array 'a' has shape"),
    "dtype": (EXPECTED | {"a": torch.zeros(3, dtype=torch.float64)}, "array 'a' has dtype"),
    "nan": (EXPECTED | {"a": torch.tensor([1, math.nan, 1])}, "array 'a' is not finite"),
    "variance": (
        EXPECTED | {"bn.running_var": torch.tensor([-1.0])},
        "array 'bn.running_var' holds negative variances",
    ),
    "infinite": (EXPECTED | {"b": torch.tensor([1, -math.inf])}, "array 'b' is not finite"),
}

EXTRA = {"variance": {"bn.running_var": torch.ones(1)}}


@pytest.mark.parametrize("defect", STATES)
def test_misshapen_weights_are_refused(defect):
    state, reason = STATES[defect]
    names = [name for name in ("a",) if name in state]
    with pytest.raises(ValueError, match=reason):
        read_update(4, reply(state, names), EXPECTED | EXTRA.get(defect, {}))


def test_bytes_that_are_no_tensors_are_refused():
    message = reply()
    message.content[BUFFERS] = ConfigRecord({BUFFERS: b"no tensors here"})
    with pytest.raises(ValueError, match="can't be read"):
        read_update(4, message, EXPECTED)


class Intruder:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_pickle_is_never_opened(tmp_path):
    data = io.BytesIO()
    folder = str(tmp_path / "intruded")
    np.save(data, np.array([Intruder(folder)], dtype=object), allow_pickle=True)
    pickled = Array("object", (1,), "numpy.ndarray", data.getvalue())
    message = reply()
    message.content["arrays"] = ArrayRecord({"a": pickled})
    with pytest.raises(ValueError, match="can't be read"):
        read_update(4, message, EXPECTED)
    assert not os.path.exists(folder)


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        ({"num-examples": 0}, "num-examples is 0"),
        ({"num-examples": -3}, "num-examples is -3"),
        ({"num-examples": 2.5}, "num-examples is 2.5"),
        ({"num-examples": math.nan}, "num-examples is nan"),
        ({"num-examples": 2**60}, "num-examples is 1.15"),
        ({"num-examples": None}, "num-examples is missing"),
        ({"num-examples": [1, 2]}, "num-examples is no number"),
        ({"train-loss": math.inf}, "train-loss is inf"),
        ({"train-loss": None}, "train-loss is missing"),
        ({"mine": [1.0, 2.0]}, "mine is no number"),
        ({"mine": math.nan}, "mine is nan"),
    ],
)
def test_wrong_metrics_are_refused(metrics, reason):
    with pytest.raises(ValueError, match=reason):
        read_update(4, reply(**metrics), EXPECTED)


@pytest.mark.parametrize("missing", ["arrays", "metrics"])
def test_a_reply_without_a_record_is_refused(missing):
    message = reply()
    del message.content[missing]
    with pytest.raises(ValueError, match=f"holds no {missing}"):
        read_update(4, message, EXPECTED)


def test_other_metrics_that_are_numbers_are_let_through_to_the_strategy():
    update = read_update(4, reply(norm_bit=1), EXPECTED)
    assert update.message.content["metrics"]["norm_bit"] == 1
    assert update.metrics.keys() == SOUND.keys()


@pytest.mark.parametrize("kind", [MetricRecord({}), ArrayRecord({})])
def test_a_second_record_of_a_kind_is_refused(kind):
    """Strategies would end the run with it."""
    message, what = reply(), "arrays" if isinstance(kind, ArrayRecord) else "metrics"
    message.content["more"] = kind
    with pytest.raises(ValueError, match=f"holds 2 records of {what} instead of one"):
        read_update(4, message, EXPECTED)


def test_an_evaluation_needs_no_arrays_but_its_metrics():
    update = read_update(4, evaluation(), None)
    assert update.state == {}
    with pytest.raises(ValueError, match="uniformity is inf"):
        read_update(4, evaluation(uniformity=math.inf), None)


@pytest.mark.parametrize("names", [["b", "a"], ["a"], []])
def test_arrays_must_be_those_of_the_request_in_their_order(names):
    """Wrappers for privacy, FedAvgM and Krum take them by their place."""
    assert read_update(4, reply(names=["a", "b"]), EXPECTED, ["a", "b"]).state.keys() == {"a", "b"}
    with pytest.raises(ValueError, match="not those of the request, in their order"):
        read_update(4, reply(names=names), EXPECTED, ["a", "b"])


def test_an_array_cannot_hide_behind_another_of_its_name():
    message = reply({"a": torch.full((3,), math.nan), "b": torch.zeros(2)})
    message.content[BUFFERS] = ConfigRecord({BUFFERS: pack_tensors(EXPECTED)})
    with pytest.raises(ValueError, match="array 'a' is there twice"):
        read_update(4, message, EXPECTED)


def test_replies_are_parted_into_updates_and_failures_that_are_named():
    answers = [
        Answer(10, reply()),
        Answer(11, None, "partition 3: out of memory"),
        Answer(12, reply(images=None)),
        Answer(13, reply()),
    ]
    partition_of = {10: 1, 11: 3, 12: 0, 13: 2}
    updates, failures = validate_replies(answers, partition_of, EXPECTED, ["a"])
    assert [update.partition for update in updates] == [1, 2]
    assert failures == [Failure(3, "out of memory"), Failure(0, "images is missing")]


def test_what_only_some_clients_tell_is_kept_from_the_strategy():
    """Strategies average all metrics, and end the run where one client lacks a name."""
    told = reply(**{"unreadable-images": 1, "cores": 2})
    made = [read_update(0, told, EXPECTED), read_update(1, reply(), EXPECTED)]
    assert reject_odd_metrics(made) == (made, [])
    assert told.content["metrics"].keys() == SOUND.keys()
    first, second = client_metrics(made, [read_update(0, evaluation(), None)], lambda _: False)
    assert (first.unreadable_images, first.cores, first.num_held_out) == (1, 2, 5)
    assert (second.unreadable_images, second.cores, second.num_held_out) == (None, None, None)


@pytest.mark.parametrize("wrong", [-1, 0.5, math.nan, 2**60, [1]])
@pytest.mark.parametrize("name", ["unreadable-images", "cores"])
def test_what_clients_tell_beside_must_be_counts(name, wrong):
    with pytest.raises(ValueError, match=f"{name} is "):
        read_update(4, reply(**{name: wrong}), EXPECTED)


def updates_with(*metrics):
    return [read_update(n, reply(**more), EXPECTED) for n, more in enumerate(metrics)]


def test_metrics_unlike_those_of_most_are_failures():
    made = updates_with({"bit": 1}, {"bit": 0}, {}, {"bit": 1, "mine": 2}, {"bit": 0})
    kept, failures = reject_odd_metrics(made)
    assert [update.partition for update in kept] == [0, 1, 4]
    assert failures == [
        Failure(2, "its metrics lack bit, unlike those of most clients"),
        Failure(3, "its metrics have mine, unlike those of most clients"),
    ]


def test_of_two_kinds_as_often_the_first_clients_counts():
    kept, failures = reject_odd_metrics(updates_with({}, {"mine": 1}))
    assert [update.partition for update in kept] == [0]
    assert [failure.partition for failure in failures] == [1]


def test_equal_or_no_metrics_are_no_trouble():
    made = updates_with({}, {}, {})
    assert reject_odd_metrics(made) == (made, [])
    assert reject_odd_metrics([]) == ([], [])


def test_means_are_weighted_by_samples():
    made = [Update(n, n + 1, {"loss": 10.0 * n}, {}, None, weight=n + 1) for n in range(3)]
    assert weighted_mean(made, "loss") == pytest.approx((2 * 10 + 3 * 20) / 6)
    assert weighted_mean([], "loss") is None


def updates(*steps):
    start = {"w": torch.ones(4)}
    made = [
        Update(n, 1, {}, {"w": start["w"] + step}, None, weight=1) for n, step in enumerate(steps)
    ]
    return made, start


def test_steps_and_angles_are_measured():
    first, second = torch.tensor([1.0, 0, 0, 0]), torch.tensor([1.0, 1.0, 0, 0])
    kept, failures = reject_outliers(*updates(first, second), ["w"], 10)
    assert failures == []
    assert [update.update_norm for update in kept] == pytest.approx([1, math.sqrt(2)])
    assert [update.cosine for update in kept] == pytest.approx([math.sqrt(0.5)] * 2)


def test_a_step_far_beyond_the_median_is_refused():
    made, start = updates(*(torch.full((4,), size) for size in (0.01, 0.02, 0.03, 0.5)))
    kept, failures = reject_outliers(made, start, ["w"], 10)
    assert [update.partition for update in kept] == [0, 1, 2]
    assert failures == [Failure(3, "its weights moved by 1, over 10 times 0.05")]
    assert len(reject_outliers(made, start, ["w"], 0)[0]) == 4


def test_a_lonely_step_far_beyond_the_model_is_refused():
    kept, failures = reject_outliers(*updates(torch.full((4,), 1e30)), ["w"], 10)
    assert not kept
    assert failures[0].partition == 0


def test_a_step_that_overflows_is_refused():
    big = torch.finfo(torch.float32).max
    kept, _ = reject_outliers(*updates(torch.full((4,), big), *[torch.ones(4)] * 2), ["w"], 10)
    assert [update.partition for update in kept] == [1, 2]


def test_statistics_far_beyond_the_median_are_refused():
    start = {"w": torch.ones(2), "bn.running_mean": torch.zeros(2)}
    made = [
        Update(
            n,
            1,
            {},
            {"w": torch.full((2,), 1.1), "bn.running_mean": torch.full((2,), m)},
            None,
            weight=1,
        )
        for n, m in enumerate((0.1, 0.2, 1e9))
    ]
    kept, failures = reject_outliers(made, start, ["w"], 10)
    assert [update.partition for update in kept] == [0, 1]
    assert "statistics moved by 1.41e+09" in failures[0].reason


def test_no_updates_are_no_trouble():
    assert reject_outliers([], {"w": torch.ones(4)}, ["w"], 10) == ([], [])
