"""A client's part of secure aggregation: four answers a round, see docs/privacy.md.

The protocol is that of Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving
Machine Learning", CCS 2017, https://eprint.iacr.org/2017/281, for a server that may look at
all it gets and follows the protocol.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from torch import Tensor

from fedssl.federation.messages import ARRAYS, CONFIG, METRICS, RUN, read_state, write_tensors
from fedssl.federation.secure.fixed_point import FixedPoint
from fedssl.federation.secure.masks import (
    KEY_BYTES,
    MASK,
    OWN,
    SEAL,
    agree,
    derive,
    mask,
    new_secret,
    public_of,
    seal,
    share,
    unseal,
)
from fedssl.federation.secure.signing import check_signatures, sign

KEYS, SHARES, UNMASK = "secure_keys", "secure_shares", "secure_unmask"  # actions, in their order
MASKED = "masked"  # the one array of a masked update
CUT = "numbers-cut"  # metric: how many numbers of an update were too large
STATE = "secure"  # what a client remembers within a round
PREFIX = "secure-"  # of entries of the config record


@dataclass(frozen=True)
class Signing:
    """How a node's keys are signed, and those of others checked.

    Attributes:
        key_file: of the node's private key; None signs nothing.
        nodes_file: the roster with everyone's public key; None checks nothing.
    """

    key_file: Path | None = None
    nodes_file: Path | None = None


def answer_keys(
    message: Message, context: Context, partition: int, num_examples: int, signing: Signing
) -> Message:
    """Draw the keys of a round, and tell the public ones."""
    occasion = occasion_of(message)
    drawn = {"mask": new_secret(), "seal": new_secret(), "own": secrets.token_bytes(KEY_BYTES)}
    context.state[STATE] = ConfigRecord({"occasion": occasion, "partition": partition, **drawn})
    publics = [public_of(drawn["mask"]), public_of(drawn["seal"])]
    text = signed_text(occasion, partition, *publics)
    signature = sign(signing.key_file, text) if signing.key_file else b""
    return Message(
        RecordDict(
            {
                METRICS: MetricRecord({"partition-id": partition, "num-examples": num_examples}),
                CONFIG: ConfigRecord({"keys": [*publics, signature]}),
            }
        ),
        reply_to=message,
    )


def answer_shares(message: Message, context: Context, signing: Signing) -> Message:
    """Share the secrets of a round among the clients, each share sealed for one of them.

    Raises:
        ValueError: the server's list of clients is not what it should be.
    """
    state, told = _remembered(message, context), _read(message)
    me, occasion = int(state["partition"]), bytes(state["occasion"])
    if "partitions" in state:
        raise ValueError("the secrets of this round are shared already")
    partitions, publics = list(told["partitions"]), list(told["publics"])
    seals, threshold = list(told["seals"]), int(told["threshold"])
    own = [public_of(bytes(state[name])) for name in ("mask", "seal")]
    if me not in partitions or sorted(set(partitions)) != partitions:
        raise ValueError("the list of clients is not in order, or does not hold this one")
    place = partitions.index(me)
    if len(publics) != len(partitions) or len(seals) != len(partitions):
        raise ValueError("there is not a pair of keys for each client")
    if [publics[place], seals[place]] != own or len({*publics, *seals}) != 2 * len(partitions):
        raise ValueError("a public key was changed, or stands there twice")
    if not len(partitions) / 2 < threshold <= len(partitions):
        raise ValueError(f"a threshold of {threshold} of {len(partitions)} clients is none")
    if signing.nodes_file:
        both = zip(partitions, publics, seals, told["signatures"], strict=True)
        check_signatures(
            signing.nodes_file,
            {number: (signed_text(occasion, number, m, s), sig) for number, m, s, sig in both},
            threshold,
        )
    cut = {name: share(bytes(state[name]), threshold, len(partitions)) for name in ("own", "mask")}
    sealed = []
    for number, public, mine, masking in zip(partitions, seals, *cut.values(), strict=True):
        key = _seal_key(state, me, number, public)
        sealed.append(b"" if number == me else seal(key, mine + masking))
    state |= {
        **{"partitions": partitions, "publics": publics, "seals": seals, "threshold": threshold},
        **{"own share": cut["own"][place], "mask share": cut["mask"][place]},
    }
    context.state[STATE] = ConfigRecord(state)
    return Message(RecordDict({CONFIG: ConfigRecord({"sealed": sealed})}), reply_to=message)


def mask_update(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Train, and mask the update: one of Flower's mods, around those that clip.

    Raises:
        ValueError: the server asks for something that the round's keys are not for.
        FloatingPointError: the update is not finite, which nobody else could see.
    """
    state, told = _remembered(message, context), _read(message)
    partitions, chosen = list(state["partitions"]), list(told["chosen"])
    if "chosen" in state:
        raise ValueError("the update of this round is masked already")
    me = int(state["partition"])
    if me not in chosen or not set(chosen) <= set(partitions) or sorted(set(chosen)) != chosen:
        raise ValueError("the list of those who train does not fit the round's keys")
    if len(chosen) < int(state["threshold"]) or len(told["sealed"]) != len(chosen):
        raise ValueError(f"{len(chosen)} clients are below the threshold")
    start = {name: value.clone() for name, value in read_state(message.content).items()}
    reply = call_next(message, context)
    if reply.has_error():
        return reply
    plan = FixedPoint(len(partitions), float(told["largest"]), float(told["longest"]))
    after = read_state(reply.content)
    numbers, cut = plan.encode(after, start, float(told["weight"]))
    numbers += mask(derive(bytes(state["own"]), OWN, bytes(state["occasion"])), len(numbers))
    publics = dict(zip(partitions, state["publics"], strict=True))
    for other in chosen:
        if other != me:
            key = agree(bytes(state["mask"]), publics[other], MASK, bytes(state["occasion"]))
            add_mask(numbers, key, me, other)
    context.state[STATE] = ConfigRecord({**state, "chosen": chosen, "sealed": list(told["sealed"])})
    metrics = reply.content.metric_records[METRICS]
    reply.content = RecordDict(
        {
            ARRAYS: ArrayRecord({MASKED: Array(numbers)}),
            METRICS: MetricRecord({**metrics, CUT: cut}),
            **write_tensors(counters_of(after)),
        }
    )
    return reply


def answer_unmask(message: Message, context: Context) -> Message:
    """Give a share of each client's secret: its own mask's if it answered, else of the others'.

    Of no client both: the two together would open its update. A round has one such answer.

    Raises:
        ValueError: the list does not fit the round, or was answered.
    """
    state, told = _remembered(message, context), _read(message)
    if "chosen" not in state:
        raise ValueError("this client has masked nothing in this round")
    me, answered = int(state["partition"]), list(told["answered"])
    chosen = list(state["chosen"])
    if me not in answered or not set(answered) <= set(chosen):
        raise ValueError("the list of those who answered does not fit the round")
    if len(set(answered)) < int(state["threshold"]):
        raise ValueError(f"{len(set(answered))} clients are below the threshold")
    del context.state[STATE]  # whatever follows, these keys are used up
    seals = dict(zip(state["partitions"], state["seals"], strict=True))
    shares = []
    for number, sealed in zip(chosen, state["sealed"], strict=True):
        if number == me:
            shares.append(bytes(state["own share"]))
            continue
        text = unseal(_seal_key(state, number, me, seals[number]), sealed)
        half = len(text) // 2
        shares.append(text[:half] if number in answered else text[half:])
    return Message(RecordDict({CONFIG: ConfigRecord({"shares": shares})}), reply_to=message)


def add_mask(numbers: np.ndarray, key: bytes, one: int, other: int) -> None:
    """Add to one client's numbers, in place, the mask that another takes away from its own."""
    if one < other:
        numbers += mask(key, len(numbers))
    else:
        numbers -= mask(key, len(numbers))


def signed_text(occasion: bytes, partition: int, mask_public: bytes, seal_public: bytes) -> bytes:
    """Write what a node signs."""
    return b"|".join([occasion, str(partition).encode(), mask_public, seal_public])


def occasion_of(message: Message) -> bytes:
    """Name the run and the round of a message."""
    config = message.content.config_records[CONFIG]
    return f"{config[RUN]!s}|{int(str(config['server-round']))}".encode()


def is_masked(message: Message) -> bool:
    """Tell whether a training message asks for a masked update."""
    return f"{PREFIX}chosen" in message.content.config_records[CONFIG]


def counters_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the arrays out of a state that travel as they are: counts of batches."""
    return {name: value for name, value in state.items() if not value.is_floating_point()}


def _remembered(message: Message, context: Context) -> dict:
    """Read what this client remembers of the round.

    Raises:
        ValueError: nothing, as after a new start.
    """
    state = context.state.get(STATE)
    if not isinstance(state, ConfigRecord) or state["occasion"] != occasion_of(message):
        raise ValueError("this client has no keys of this round")
    return dict(state)


def _read(message: Message) -> dict:
    """Read what the server says for a step."""
    config = message.content.config_records[CONFIG]
    return {name.removeprefix(PREFIX): v for name, v in config.items() if name.startswith(PREFIX)}


def _seal_key(state: Mapping, sender: int, recipient: int, public: bytes) -> bytes:
    """Derive the key of one way between two clients."""
    way = SEAL + f"|{sender}|{recipient}".encode()
    return agree(bytes(state["seal"]), public, way, bytes(state["occasion"]))
