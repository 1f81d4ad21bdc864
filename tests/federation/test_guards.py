"""What a reply must be before it may touch the global model."""

import io
import math
import os

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedssl.federation.guards import Update, check_steps, count_images, read_update
from fedssl.federation.messages import pack_state

# Flower sets these before it runs an app; a message can't be made without them.
TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
EXPECTED = {"a": torch.zeros(3), "b": torch.zeros(2)}
SOUND = {"num-examples": 5, "train-loss": 1.0, "images": 5, "images-per-second": 2.0}


def reply(arrays=None, **metrics):
    """Make a training reply; a metric given as None is left out."""
    values = {k: v for k, v in (SOUND | metrics).items() if v is not None}
    content = RecordDict({"metrics": MetricRecord(values)})
    content["arrays"] = pack_state(EXPECTED) if arrays is None else arrays
    return Message(content, 1, "train")


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
    with pytest.raises(ValueError, match=reason):
        read_update(4, reply(pack_state(state)), EXPECTED | EXTRA.get(defect, {}))


def test_bytes_that_are_no_tensors_are_refused():
    garbage = Array(np.frombuffer(b"no tensors here", dtype=np.uint8))
    with pytest.raises(ValueError, match="can't be read"):
        read_update(4, reply(ArrayRecord({"safetensors": garbage})), EXPECTED)


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
    with pytest.raises(ValueError, match="can't be read"):
        read_update(4, reply(ArrayRecord({"safetensors": pickled})), EXPECTED)
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


def updates(*steps):
    start = {"w": torch.ones(4)}
    made = [Update(n, 1, {}, {"w": start["w"] + step}, None) for n, step in enumerate(steps)]
    return made, start


def test_steps_and_angles_are_measured():
    first, second = torch.tensor([1.0, 0, 0, 0]), torch.tensor([1.0, 1.0, 0, 0])
    kept, failures = check_steps(*updates(first, second), ["w"], 10)
    assert failures == []
    assert [update.step for update in kept] == pytest.approx([1, math.sqrt(2)])
    assert [update.cosine for update in kept] == pytest.approx([math.sqrt(0.5)] * 2)


def test_a_step_far_beyond_the_median_is_refused():
    made, start = updates(*(torch.full((4,), size) for size in (0.01, 0.02, 0.03, 0.5)))
    kept, failures = check_steps(made, start, ["w"], 10)
    assert [update.partition for update in kept] == [0, 1, 2]
    assert failures == [{"partition": 3, "reason": "its weights moved by 1, over 10 times 0.05"}]
    assert len(check_steps(made, start, ["w"], 0)[0]) == 4


def test_a_lonely_step_far_beyond_the_model_is_refused():
    kept, failures = check_steps(*updates(torch.full((4,), 1e30)), ["w"], 10)
    assert not kept
    assert failures[0]["partition"] == 0


def test_a_step_that_overflows_is_refused():
    big = torch.finfo(torch.float32).max
    kept, _ = check_steps(*updates(torch.full((4,), big), *[torch.ones(4)] * 2), ["w"], 10)
    assert [update.partition for update in kept] == [1, 2]


def test_statistics_far_beyond_the_median_are_refused():
    start = {"w": torch.ones(2), "bn.running_mean": torch.zeros(2)}
    made = [
        Update(n, 1, {}, {"w": torch.full((2,), 1.1), "bn.running_mean": torch.full((2,), m)}, None)
        for n, m in enumerate((0.1, 0.2, 1e9))
    ]
    kept, failures = check_steps(made, start, ["w"], 10)
    assert [update.partition for update in kept] == [0, 1]
    assert "statistics moved by 1.41e+09" in failures[0]["reason"]


def test_no_updates_are_no_trouble():
    assert check_steps([], {"w": torch.ones(4)}, ["w"], 10) == ([], [])
