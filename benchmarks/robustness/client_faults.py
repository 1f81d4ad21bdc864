"""Ways in which a client can fail or poison its update: a simulation with a round for each."""

import io
import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MessageType
from flwr.clientapp import ClientApp
from torch import Tensor

import main as program
from client import make_client_app, simulated
from fedssl.config.compose import load_config
from fedssl.federation.messages import ARRAYS, BUFFERS, METRICS, PACKED, pack_arrays, unpack_arrays
from fedssl.runs.directory import RunDirectory
from fedssl.runs.metrics import RoundMetrics
from utils import plain

FAULTY = 1  # the partition that misbehaves
TIMEOUT_S = 90.0
NAME = "encoder.conv1.weight"
SMALL = ["num_clients=3", "num_cpus=1", "precision=float32", "model.stem=imagenet"]
SMALL += ["train.local_epochs=1", "train.max_steps=1", "monitor.bank=100", "monitor.queries=50"]
SMALL += ["eval.seeds=1", "eval.epochs=1", "figures.map_images=5"]

Fault = Callable[[Message], Message]


def change_weights(change: Callable[[dict[str, Tensor]], object]) -> Fault:
    """Change the weights of a training reply."""

    def fault(reply: Message) -> Message:
        state = unpack_arrays(reply.content.array_records[ARRAYS]).to_torch_state_dict()
        change(state)
        reply.content[ARRAYS] = pack_arrays(ArrayRecord(state))
        return reply

    return fault


def change_count(count: int | None) -> Fault:
    """Change how many images a training reply claims."""

    def fault(reply: Message) -> Message:
        metrics = reply.content.metric_records[METRICS]
        del metrics["num-examples"]
        if count is not None:
            metrics["num-examples"] = count
        return reply

    return fault


def pickled(reply: Message) -> Message:
    """Put a pickled object where the weights belong."""
    data = io.BytesIO()
    np.save(data, np.array([print], dtype=object), allow_pickle=True)
    array = Array("object", (1,), "numpy.ndarray", data.getvalue())
    reply.content[ARRAYS] = ArrayRecord({PACKED: array})
    return reply


def garbled_buffers(reply: Message) -> Message:
    """Send bytes without meaning for the buffers."""
    reply.content.config_records[BUFFERS][BUFFERS] = b"not tensors"
    return reply


def no_buffers(reply: Message) -> Message:
    """Forget the buffers."""
    del reply.content[BUFFERS]
    return reply


def raise_error(reply: Message) -> Message:
    """Fail as a client's own code would."""
    raise ValueError("the camera is broken")


def kill_process(reply: Message) -> Message:
    """End without a word, as for want of memory."""
    os.kill(os.getpid(), signal.SIGKILL)
    return reply


def oversleep(reply: Message) -> Message:
    """Answer too late."""
    time.sleep(TIMEOUT_S + 5)
    return reply


# What client 1 does in each round, and a part of the reason that is expected for it.
CLIENT_FAULTS: dict[str, tuple[Fault, str]] = {
    "raises an exception": (raise_error, "the camera is broken"),
    "its process is killed": (kill_process, "its process died"),
    "takes longer than round_timeout_s": (oversleep, f"no reply within {TIMEOUT_S:g} s"),
    "weights with NaN": (
        change_weights(lambda state: state[NAME].view(-1)[:1].fill_(np.nan)),
        "is not finite",
    ),
    "weights with infinity": (
        change_weights(lambda state: state[NAME].view(-1)[:1].fill_(np.inf)),
        "is not finite",
    ),
    "weights of a wrong shape": (
        change_weights(lambda state: state.update({NAME: torch.zeros(3)})),
        "has shape (3,)",
    ),
    "an array of another name": (
        change_weights(lambda state: state.update({"other": torch.zeros(3)})),
        "array 'other' is unknown",
    ),
    "a missing array": (
        change_weights(lambda state: state.pop(NAME)),
        f"array '{NAME}' is missing",
    ),
    "a pickled object for weights": (pickled, "can't be read"),
    "bytes without meaning for buffers": (garbled_buffers, "can't be read"),
    "no buffers": (no_buffers, "0 entries of buffers"),
    "num-examples of 0": (change_count(0), "num-examples is 0"),
    "num-examples of -5": (change_count(-5), "num-examples is -5"),
    "no num-examples": (change_count(None), "num-examples is missing"),
    "weights a thousand times too large": (
        change_weights(lambda state: state[NAME].mul_(1000)),
        "moved by",
    ),
}


class FaultyClientApp(ClientApp):
    """Lets one client fail in the way of its round, outside of all mods: what travels is bad."""

    def __init__(self, sound: ClientApp, faults: Sequence[Fault]) -> None:
        """Wrap the app of the others.

        Args:
            faults: of the first rounds, one each.
        """
        super().__init__()
        self.sound, self.faults = sound, faults

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message, as the others do unless it is the faulty client's to train."""
        reply = self.sound(message, context)
        faulty = int(context.node_config["partition-id"]) == FAULTY
        if message.metadata.message_type != MessageType.TRAIN or not faulty:
            return reply
        number = int(message.content["config"]["server-round"])
        return self.faults[number - 1](reply) if number <= len(self.faults) else reply


def try_clients(folder: Path, names: Iterable[str] = CLIENT_FAULTS) -> list[dict[str, Any]]:
    """Run a round per fault and one without; see who took part in each."""
    faults = {name: CLIENT_FAULTS[name] for name in names}
    rounds = len(faults) + 1
    places = [f"output_dir={folder}", f"cache_dir={folder}/cache"]
    limits = [f"num_rounds={rounds}", f"round_timeout_s={TIMEOUT_S:g}", "min_results=2"]
    config = load_config("config", [*SMALL, *places, *limits])
    resources, image_set = program.prepare(config)
    config.num_cpus, config.num_gpus = resources.num_cpus, resources.num_gpus
    run = RunDirectory.create(folder / "clients", plain(config), config.output_dir)
    sound = make_client_app(simulated(config))
    clients = FaultyClientApp(sound, [fault for fault, _ in faults.values()])
    program.train(config, resources, image_set, run, clients=clients)
    done = run.read_metrics()
    table = []
    for (fault, (_, reason)), metrics in zip(faults.items(), done, strict=False):
        reasons = {failure.partition: failure.reason for failure in metrics.failures}
        trained = who_trained(metrics)
        told = reasons.get(FAULTY, "nothing")
        table.append(
            {
                "fault": f"client: {fault}",
                "expected": f"left out and named ({reason}), the others go on",
                "seen": f"trained: {trained}; {reasons}",
                "ok": reason in told and trained == [0, 2] and set(reasons) == {FAULTY},
            }
        )
    trained = who_trained(done[-1])
    table.append(
        {
            "fault": "client: no fault any more",
            "expected": "takes part again",
            "seen": f"trained: {trained}",
            "ok": trained == [0, 1, 2] and len(done) == rounds and not done[-1].failures,
        }
    )
    return table


def who_trained(metrics: RoundMetrics) -> list[int]:
    """List the partitions whose updates went into a round."""
    return [c.partition for c in metrics.clients if c.update_norm is not None]
