"""The clients as the server sees them: who is connected, who holds what, asking them."""

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from threading import Event

from flwr.app import ArrayRecord, Error, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedssl.federation.messages import ARRAYS, METRICS, is_packed, pack_arrays, unpack_arrays

ABSENCES = (
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ErrorCode.NODE_UNAVAILABLE,
)
POLL_S = 1.0
REPLY_POLL_S = 0.2
REPORT_EVERY_S = 15.0
RESTART_S = 2.0
DIED = "its process died, killed or for want of memory"

OnReplies = Callable[[Collection[Message]], None]


def no_op(anything: object) -> None:
    """Do nothing with what one is told."""


@dataclass(frozen=True)
class Patience:
    """How many clients a round needs, and how long it waits for them.

    Attributes:
        min_nodes: how many must be connected before a round starts.
        wait_s: how long to wait for them.
        timeout_s: how long to wait for replies.
        participants: partitions that are asked; empty for all.
    """

    min_nodes: int
    wait_s: float
    timeout_s: float
    participants: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Answer:
    """What came back from a node: a message, or the reason why there is none.

    Attributes:
        absent: nobody answered, rather than a client that failed.
    """

    node: int
    reply: Message | None
    failure: str = ""
    absent: bool = False


class Nodes:
    """Keeps track of nodes over the rounds; Flower knows them only by random numbers.

    Strategies sample from it like from a grid: node ids come in the order of
    their partitions, so that the seed alone decides which partitions take part.
    """

    def __init__(
        self,
        grid: Grid,
        patience: Patience,
        report: Callable[[str], None] = no_op,
        stop: Event | None = None,
    ) -> None:
        """Start without having met any.

        Args:
            report: told, in a line, of waiting and of nodes that come and go.
            stop: set by another thread to end all waiting.
        """
        self.grid, self.patience, self.report = grid, patience, report
        self.stop = stop or Event()
        self.partition_of: dict[int, int] = {}
        self._present: list[int] = []

    def get_node_ids(self) -> list[int]:
        """List the nodes that take part in the current round and are not lost, by partition."""
        chosen = self.patience.participants or set(self.partition_of.values())
        return [node for node in self._present if self.partition_of[node] in chosen]

    def wait_for_clients(self) -> None:
        """Wait for the nodes of a new round and learn which partition each holds.

        Raises:
            RuntimeError: too few in time, two with the same partition, or one
                that can't take part.
        """
        deadline = time.monotonic() + self.patience.wait_s
        next_report = time.monotonic() + POLL_S
        while True:
            connected = list(self.grid.get_node_ids())
            if len(connected) >= self.patience.min_nodes:
                self._register([node for node in connected if node not in self.partition_of])
                self._present = self._one_per_partition(connected)
                if len(self._present) >= self.patience.min_nodes:
                    return
            now = time.monotonic()
            have = f"{len(connected)} of {self.patience.min_nodes} nodes are connected"
            if now >= deadline:
                raise RuntimeError(
                    f"{have} after waiting {self.patience.wait_s:g} s; start the others, or change "
                    "min_nodes or node_wait_s"
                )
            if now >= next_report:
                self.report(f"{have}; waiting at most {deadline - now:.0f} s for the others")
                next_report = now + REPORT_EVERY_S
            self._pause(POLL_S if connected else 0.1)

    def _register(self, strangers: list[int]) -> None:
        """Ask new nodes which partition they hold; they check their images meanwhile."""
        if not strangers:
            return
        messages = [Message(RecordDict(), node, MessageType.QUERY) for node in strangers]
        earlier = set(self.partition_of.values())
        held: set[int] = set()
        for answer in self._exchange(messages):
            if answer.reply is None:
                if answer.absent:
                    continue  # gone again
                raise RuntimeError(f"a client can't take part: {answer.failure}")
            partition = int(str(answer.reply.content.metric_records[METRICS]["partition-id"]))
            if partition in held:
                raise RuntimeError(
                    f"two nodes hold partition {partition}; give each its own partition-id"
                )
            held.add(partition)
            self.partition_of[answer.node] = partition
            back = " again, at a new node" if partition in earlier else ""
            self.report(f"partition {partition} is connected{back}")

    def _one_per_partition(self, connected: list[int]) -> list[int]:
        """Sort by partition; the node that came last replaces one that died and came back."""
        newest = {
            partition: node for node, partition in self.partition_of.items() if node in connected
        }
        return [newest[partition] for partition in sorted(newest)]

    def send_and_receive(
        self, messages: Iterable[Message], on_replies: OnReplies = no_op
    ) -> list[Answer]:
        """Send messages and wait for the replies, in the order of the partitions.

        A client whose process died is asked once more: it may have been another's
        message that killed the process. Nodes that are gone or too slow take no
        further part in the round.

        Args:
            on_replies: told of all replies so far, at the start and whenever one comes in.
        """
        messages = list(messages)
        answers = self._exchange(messages, on_replies)
        died = [place for place, answer in enumerate(answers) if answer.failure == DIED]
        if died:
            self._pause(RESTART_S)
            again = self._exchange([_repeat(messages[place]) for place in died])
            for place, answer in zip(died, again, strict=True):
                answers[place] = answer
        gone = {answer.node for answer in answers if answer.absent}
        self._present = [node for node in self._present if node not in gone]
        return sorted(answers, key=lambda answer: self.partition_of[answer.node])

    def _exchange(self, messages: list[Message], on_replies: OnReplies = no_op) -> list[Answer]:
        replies = self._deliver(messages, on_replies)
        answers = []
        for message in messages:
            node = message.metadata.dst_node_id
            reply = replies.get(message.metadata.message_id)
            if reply is None:
                late = f"no reply within {self.patience.timeout_s:g} s"
                answers.append(Answer(node, None, late, absent=True))
            elif reply.has_error():
                absent = reply.error.code in ABSENCES
                answers.append(Answer(node, None, explain(reply.error), absent))
            else:
                answers.append(_unpack(node, reply))
        return answers

    def _deliver(self, messages: list[Message], on_replies: OnReplies) -> dict[str, Message]:
        """Send messages and collect replies by the ids of the messages.

        The grid's own method waits three seconds between two looks when it goes over HTTP.
        """
        waiting = {
            message_id for message_id in self.grid.push_messages(_pack(messages)) if message_id
        }
        replies: dict[str, Message] = {}
        deadline = time.monotonic() + self.patience.timeout_s
        on_replies(replies.values())
        while waiting and time.monotonic() < deadline:
            for reply in self.grid.pull_messages(waiting):
                replies[reply.metadata.reply_to_message_id] = reply
                on_replies(replies.values())
            waiting -= replies.keys()
            if waiting:
                self._pause(REPLY_POLL_S)
        return replies

    def _pause(self, seconds: float) -> None:
        """Sleep, unless or until somebody stops the waiting.

        Raises:
            RuntimeError: somebody did.
        """
        if self.stop.wait(seconds):
            raise RuntimeError("stopped while waiting for clients")


def _pack(messages: Iterable[Message]) -> list[Message]:
    """Pack the arrays of messages for the way; those that share a record are packed once."""
    packed: dict[int, ArrayRecord] = {}
    messages = list(messages)
    for message in messages:
        arrays = message.content.get(ARRAYS)
        if not isinstance(arrays, ArrayRecord) or is_packed(arrays):  # sent before
            continue
        if id(arrays) not in packed:
            packed[id(arrays)] = pack_arrays(arrays)
        message.content = RecordDict({**message.content, ARRAYS: packed[id(arrays)]})
    return messages


def _unpack(node: int, reply: Message) -> Answer:
    """Take the arrays of a reply out of their packing, or say why that can't be done."""
    if isinstance(arrays := reply.content.get(ARRAYS), ArrayRecord):
        try:
            reply.content[ARRAYS] = unpack_arrays(arrays)
        except ValueError as error:
            return Answer(node, None, str(error))
    return Answer(node, reply)


def _repeat(message: Message) -> Message:
    """Make the same message anew; Flower gives each an identity of its own."""
    metadata = message.metadata
    return Message(
        message.content, metadata.dst_node_id, metadata.message_type, group_id=metadata.group_id
    )


def explain(error: Error) -> str:
    """Say in one line what an error reply means.

    Flower wraps a client's own line as "<class '...'>:<'line'>", and in a
    simulation Ray's account of the failure lies around it.
    """
    if error.code == ErrorCode.NODE_UNAVAILABLE:
        return "its node is gone, no heartbeat any more"
    text = (error.reason or "no reason given").strip().removesuffix("'>")
    if "ActorDiedError" in text or "ActorUnavailableError" in text:
        return DIED
    for mark in (" occurred. Message:", ":<'"):
        if mark in text:
            text = text.rpartition(mark)[2]
            break
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else "no reason given"
