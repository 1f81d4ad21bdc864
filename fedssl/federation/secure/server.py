"""The server's part of secure aggregation: four messages a round, one sum; see docs/privacy.md."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedssl.errors import name_some
from fedssl.federation.guards import (
    TRAINED,
    Update,
    check_num_examples,
    check_state,
    read_metrics,
    read_replies,
    take_extra,
)
from fedssl.federation.messages import ARRAYS, CONFIG, METRICS, RUN, read_tensors
from fedssl.federation.nodes import Nodes, OnReplies, no_op
from fedssl.federation.secure.client import (
    KEYS,
    MASKED,
    PREFIX,
    SHARES,
    UNMASK,
    add_mask,
    counters_of,
)
from fedssl.federation.secure.fixed_point import FixedPoint, count_floats, float_names, is_weight
from fedssl.federation.secure.masks import (
    KEY_BYTES,
    MASK,
    OWN,
    agree,
    combine,
    derive,
    mask,
    public_of,
)
from fedssl.federation.weights import Weighting
from fedssl.runs.metrics import Failure


@dataclass(frozen=True)
class SecureSettings:
    """How updates are masked.

    Attributes:
        threshold: share of a round's clients of which more must answer to the end.
        largest: a number of an update is cut to this, in both directions.
        max_ratio: an update is clipped to so many times the length of the weights.
    """

    threshold: float
    largest: float
    max_ratio: float

    def least(self, clients: int) -> int:
        """Count the clients that must answer to the end; more than half."""
        return min(clients, math.floor(max(self.threshold, 0.5) * clients) + 1)


@dataclass(frozen=True)
class KeysOf:
    """What a client told of its keys.

    Attributes:
        num_examples: images that it says it has.
    """

    mask_public: bytes
    seal_public: bytes
    signature: bytes
    num_examples: int


@dataclass(frozen=True)
class MaskedMean:
    """What a round gave.

    Attributes:
        mean: of the states of those who answered; counters are not whole.
        updates: of those, without states, which nobody knows.
        failures: of all steps.
    """

    mean: Mapping[str, Tensor]
    updates: list[Update]
    failures: list[Failure]


class SecureRound:
    """Asks the clients of a round for masked updates, and takes the masks off their sum.

    What a client fails in is a failure of the round like any other; a round in which fewer
    than `least` come to the end has no sum.
    """

    def __init__(
        self,
        nodes: Nodes,
        settings: SecureSettings,
        weighting: Weighting,
        round_number: int,
        run: str,
    ) -> None:
        """Begin a round.

        Args:
            run: names the run among all.
        """
        self.nodes, self.settings, self.weighting = nodes, settings, weighting
        self.round_number = round_number
        self.request: dict[str, Any] = {RUN: run, "server-round": round_number}
        self.occasion = f"{run}|{round_number}".encode()
        self.failures: list[Failure] = []

    def collect(
        self,
        messages: Sequence[Message],
        start: Mapping[str, Tensor],
        on_replies: OnReplies = no_op,
    ) -> MaskedMean:
        """Go through the four steps.

        Args:
            messages: of the strategy, to those who are to train.
            start: state of the model that they carry.

        Raises:
            RuntimeError: too few clients, or a sum that can't be.
        """
        asked = {self.nodes.partition_of[m.metadata.dst_node_id]: m for m in messages}
        least = self.settings.least(len(asked))
        keys = self._ask_keys(asked, least)
        weights = dict(zip(keys, self._weigh(keys), strict=True))
        sealed = self._ask_shares({p: asked[p] for p in keys}, keys, least)
        plan = self._plan(len(keys), start)
        chosen = list(sealed)
        messages = [
            _add(
                asked[partition],
                chosen=chosen,
                sealed=[sealed[other].get(partition, b"") for other in chosen],
                weight=weights[partition],
                largest=plan.largest,
                longest=plan.longest,
            )
            for partition in chosen
        ]
        total = np.zeros(count_floats(start), np.uint32)
        counters = counters_of(start)

        def read(partition: int, reply: Message) -> tuple[Update, dict[str, Tensor]]:
            metrics = read_metrics(reply.content, TRAINED)
            if check_num_examples(metrics["num-examples"]) != keys[partition].num_examples:
                raise ValueError("its number of images changed within the round")
            numbers = _read_numbers(reply.content, len(total))
            state = read_tensors(reply.content, "counters") if counters else {}
            check_state(state, counters)
            metrics |= take_extra(reply.content)
            total[:] += numbers
            update = Update(partition, keys[partition].num_examples, metrics, {}, reply, 1)
            return update, state

        answers = self.nodes.send_and_receive(messages, on_replies)
        told = self._read(answers, read, "")
        answered = [update.partition for update, _ in told]
        self._require(answered, least, "masked updates")
        total -= self._masks(keys, chosen, {p: asked[p] for p in answered}, least, len(total))
        weight = sum(weights[partition] for partition in answered)
        mean = plan.decode(total, start, weight)
        try:
            plan.check_sum(mean, start)
        except ValueError as error:
            raise RuntimeError(f"round {self.round_number}: {error}") from error
        for name in counters:
            each = [weights[u.partition] / weight * state[name].double() for u, state in told]
            mean[name] = torch.stack(each).sum(dim=0)
        return MaskedMean(mean, self.weighting.apply([u for u, _ in told]), self.failures)

    def _ask_keys(self, asked: Mapping[int, Message], least: int) -> dict[int, KeysOf]:
        """Ask everyone for the public keys of the round."""

        def read(partition: int, reply: Message) -> tuple[int, KeysOf]:
            images = read_metrics(reply.content, ["num-examples"])["num-examples"]
            *publics, signature = _read_list(reply, "keys", 3)
            if {KEY_BYTES} != {len(public) for public in publics}:
                raise ValueError("no public keys")
            return partition, KeysOf(publics[0], publics[1], signature, check_num_examples(images))

        keys = dict(self._exchange(asked, KEYS, {}, read, "keys"))
        self._require(keys, least, "keys")
        return keys

    def _ask_shares(
        self, asked: Mapping[int, Message], keys: Mapping[int, KeysOf], least: int
    ) -> dict[int, dict[int, bytes]]:
        """Tell everyone all keys; give by sender and recipient the sealed shares."""
        said = {
            "partitions": list(keys),
            "publics": [each.mask_public for each in keys.values()],
            "seals": [each.seal_public for each in keys.values()],
            "signatures": [each.signature for each in keys.values()],
            "threshold": least,
        }

        def read(partition: int, reply: Message) -> tuple[int, dict[int, bytes]]:
            return partition, dict(zip(keys, _read_list(reply, "sealed", len(keys)), strict=True))

        sealed = dict(self._exchange(asked, SHARES, said, read, "shares"))
        self._require(sealed, least, "shares")
        return sealed

    def _masks(
        self,
        keys: Mapping[int, KeysOf],
        chosen: Sequence[int],
        answered: Mapping[int, Message],
        least: int,
        count: int,
    ) -> np.ndarray:
        """Put together what the sum of the masked updates has too much.

        These are the own masks of those who answered, and the masks between them and those
        who dropped out.

        Args:
            chosen: those who were to train.
            answered: those who did, with their messages.
            count: of numbers.
        """

        def read(partition: int, reply: Message) -> list[bytes]:
            return _read_list(reply, "shares", len(chosen))

        given = self._exchange(answered, UNMASK, {"answered": list(answered)}, read, "shares")
        self._require(given, least, "shares of secrets")
        total = np.zeros(count, np.uint32)
        for place, partition in enumerate(chosen):
            try:
                secret = combine([shares[place] for shares in given[:least]])
                if partition in answered:
                    total += mask(derive(secret, OWN, self.occasion), count)
                    continue
                if public_of(secret) != keys[partition].mask_public:
                    raise ValueError("its key is another")
                for other in answered:
                    key = agree(secret, keys[other].mask_public, MASK, self.occasion)
                    add_mask(total, key, other, partition)
            except (ValueError, IndexError) as error:
                raise RuntimeError(
                    f"round {self.round_number}: the shares of client {partition}'s secret don't "
                    f"give it back ({error}); one of them is false"
                ) from error
        return total

    def _exchange(
        self,
        asked: Mapping[int, Message],
        action: str,
        said: Mapping,
        read: Callable,
        what: str,
    ) -> list:
        """Send a step's message to the nodes of some messages, and read the answers."""
        config = ConfigRecord(self.request | _said(**said))
        messages = [
            Message(RecordDict({CONFIG: config}), message.metadata.dst_node_id, f"query.{action}")
            for message in asked.values()
        ]
        return self._read(self.nodes.send_and_receive(messages), read, f"{what}: ")

    def _read(self, answers: Sequence, read: Callable, what: str) -> list:
        """Read answers; note who gave none, or none that can be read."""

        def read_soundly(partition: int, reply: Message) -> object:
            try:
                return read(partition, reply)
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"can't be read ({type(error).__name__}: {error})") from error

        found, failures = read_replies(answers, self.nodes.partition_of, read_soundly)
        names = self.nodes.membership.names
        self.failures += [
            replace(each, reason=f"{what}{each.reason}", name=names.get(each.partition))
            for each in failures
        ]
        return found

    def _weigh(self, keys: Mapping[int, KeysOf]) -> list[float]:
        """Give the weights of clients, at most 1, so that their updates keep their range."""
        weights = self.weighting.weigh([each.num_examples for each in keys.values()])
        return [weight / max(weights) for weight in weights]

    def _plan(self, clients: int, start: Mapping[str, Tensor]) -> FixedPoint:
        """Plan how updates become numbers."""
        names = [name for name in float_names(start) if is_weight(name)]
        length = math.hypot(*(float(start[name].norm()) for name in names))
        return FixedPoint(clients, self.settings.largest, self.settings.max_ratio * length)

    def _require(self, there: Sequence[int] | Mapping | list, least: int, what: str) -> None:
        """Make sure that enough clients are still there.

        Raises:
            RuntimeError: they are too few.
        """
        if len(there) < least:
            reasons = name_some([f"{failure.who}: {failure.reason}" for failure in self.failures])
            raise RuntimeError(
                f"round {self.round_number}: {len(there)} clients gave {what}, secure aggregation "
                f"needs {least} (secagg.threshold){f' ({reasons})' if reasons else ''}"
            )


def as_update(mean: Mapping[str, Tensor], names: Sequence[str], request: Message) -> Update:
    """Make of a mean what a strategy takes for the update of a single client.

    Args:
        names: of the arrays that the strategy acts on.
        request: any message of the round.
    """
    content = RecordDict(
        {
            ARRAYS: ArrayRecord({name: mean[name] for name in names}),
            METRICS: MetricRecord({"num-examples": 1}),
        }
    )
    message = Message(content, request.metadata.dst_node_id, request.metadata.message_type)
    return Update(0, 1, {}, mean, message, weight=1)


def _add(message: Message, **values: Any) -> Message:
    """Make of a message, whose records it may share with others, one that says more."""
    config = message.content.config_records[CONFIG]
    content = {**message.content, CONFIG: ConfigRecord({**config, **_said(**values)})}
    metadata = message.metadata
    return Message(RecordDict(content), metadata.dst_node_id, metadata.message_type)


def _said(**values: Any) -> dict[str, Any]:
    """Name what a message says for secure aggregation."""
    return {f"{PREFIX}{name}": value for name, value in values.items()}


def _read_list(reply: Message, name: str, count: int) -> list[bytes]:
    """Read a list of byte strings.

    Raises:
        ValueError: it is something else, or of another length.
    """
    found = reply.content.config_records[CONFIG].get(name)
    if not isinstance(found, list) or len(found) != count:
        raise ValueError(f"no list of {count} {name}")
    texts = [each for each in found if isinstance(each, bytes)]
    if len(texts) != count:
        raise ValueError(f"{name} are not all bytes")
    return texts


def _read_numbers(content: RecordDict, count: int) -> np.ndarray:
    """Read a masked update.

    Raises:
        ValueError: it is something else.
    """
    arrays = content.get(ARRAYS)
    if not isinstance(arrays, ArrayRecord) or list(arrays) != [MASKED]:
        raise ValueError("its update is not masked")
    numbers = arrays[MASKED].numpy()
    if numbers.dtype != np.uint32 or numbers.shape != (count,):
        raise ValueError(f"its masked update is {numbers.dtype} {numbers.shape}")
    return numbers
