"""The clients as the server sees them: waiting for them, asking them, with patience."""

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from threading import Event

from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid

from fedssl.federation.membership import STALE_S, Membership, Patience, Registration
from fedssl.federation.messages import (
    ABSENCES,
    ARRAYS,
    DIED,
    MORE_BYTES,
    count_bytes,
    explain,
    pack_messages,
    repeat_message,
    unpack_reply,
)
from fedssl.federation.wire import DOWN, Wire
from fedssl.runs.metrics import NodeEvent

POLL_S = 1.0
REPLY_POLL_S = 0.2
REPORT_EVERY_S = 15.0
RESTART_S = 2.0

OnReplies = Callable[[Collection[Message]], None]


def no_op(anything: object) -> None:
    """Do nothing with what one is told."""


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
    """Waits for the nodes of a run, asks them, and collects their replies.

    Strategies sample from it like from a grid: node ids come in the order of
    their partitions, so that the seed alone decides which partitions take part.
    """

    def __init__(
        self,
        grid: Grid,
        patience: Patience,
        report: Callable[[str], None] = no_op,
        stop: Event | None = None,
        membership: Membership | None = None,
        wire: Wire = "float32",
    ) -> None:
        """Start without having met any.

        Args:
            report: told, in a line, of waiting and of nodes that come and go.
            stop: set by another thread to end all waiting.
            membership: decides who may take part; by default whoever comes first.
            wire: how models are rounded on their way.
        """
        self.grid, self.patience, self.report = grid, patience, report
        self.stop = stop or Event()
        self.wire: Wire = wire
        self.membership = membership or Membership()
        self.registration = Registration(grid, patience, self.membership)
        self.events: list[NodeEvent] = []  # since `take_events`
        self.sent_bytes = self.received_bytes = 0  # since `take_bytes`
        self._present: list[int] = []
        self._silent: set[int] = set()  # who did not answer the last message

    @property
    def partition_of(self) -> Mapping[int, int]:
        """The partitions of all nodes that took part at some time."""
        return self.membership.partition_of

    def get_node_ids(self) -> list[int]:
        """List the nodes that take part in the current round and are not lost, by partition."""
        chosen = self.patience.participants or set(self.partition_of.values())
        return [node for node in self._present if self.partition_of[node] in chosen]

    def take_events(self) -> tuple[NodeEvent, ...]:
        """Give who joined, left or was refused since the last call."""
        events, self.events = tuple(self.events), []
        return events

    def take_bytes(self) -> tuple[int, int]:
        """Give the bytes of the messages sent and of the replies, since the last call."""
        found = self.sent_bytes, self.received_bytes
        self.sent_bytes = self.received_bytes = 0
        return found

    def wait_for_clients(self) -> None:
        """Wait for the nodes of a new round and learn which partition each holds.

        A round that has all its clients waits for no newcomer: who asks for a place
        then is answered at the next one.

        Raises:
            RuntimeError: too few in time; before the first round, two with the same
                partition, or one that can't take part where no other could.
        """
        began = time.monotonic()
        deadline, next_report = began + self.patience.wait_s, began + POLL_S
        least, registration = self.patience.min_nodes, self.registration
        while True:
            registration.update(self._silent, until=min(deadline, began + STALE_S))
            self._tell_events()
            self._present = self.membership.present()
            now = time.monotonic()
            if len(self._present) < least:
                if not registration.is_open:
                    self._check_possible(late=now >= deadline)
            elif not registration.is_open or (registration.started and now >= deadline):
                registration.start()
                return
            if now >= next_report:
                left = f"at most {max(0, deadline - now):.0f} s for the others"
                what = "for their answers" if registration.is_open else left
                refused = self.membership.describe_refusals()
                self.report(f"{self._have()}; waiting {what}{refused}")
                next_report = now + REPORT_EVERY_S
            quick = registration.is_waiting or not self.membership.connected
            self._pause(REPLY_POLL_S if quick else POLL_S)

    def _tell_events(self) -> None:
        for event in self.membership.take_events():
            self.events.append(event)
            self.report(str(event))

    def _check_possible(self, late: bool) -> None:
        """Make sure that waiting on may help."""
        members, started = self.membership, self.registration.started
        refused = members.describe_refusals()
        if not started and members.failed and len(members.candidates()) < self.patience.min_nodes:
            raise RuntimeError(f"a client can't take part{refused.removeprefix('; refused')}")
        if late:
            raise RuntimeError(
                f"{self._have()} after waiting {self.patience.wait_s:g} s; start the others, or "
                f"change min_nodes or node_wait_s{refused}"
            )

    def _have(self) -> str:
        """Say how many nodes there are and, once they are asked, which partitions they hold."""
        members, least = self.membership, self.patience.min_nodes
        if not members.holders:
            return f"{len(members.candidates())} of {least} nodes are connected"
        told = members.describe(self.patience.num_clients)
        return f"{len(members.holders)} of {least} nodes take part ({told})"

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
        starts = [_arrays_of(message) for message in messages]  # before they are rounded
        answers = self._exchange(messages, starts, on_replies)
        died = [place for place, answer in enumerate(answers) if answer.failure == DIED]
        if died:
            self._pause(RESTART_S)
            repeated = [repeat_message(messages[place]) for place in died]
            again = self._exchange(repeated, [starts[place] for place in died])
            for place, answer in zip(died, again, strict=True):
                answers[place] = answer
        gone = {answer.node for answer in answers if answer.absent}
        self._silent -= {answer.node for answer in answers}
        self._silent |= gone
        self._present = [node for node in self._present if node not in gone]
        return sorted(answers, key=lambda answer: self.partition_of[answer.node])

    def _exchange(
        self,
        messages: list[Message],
        starts: list[ArrayRecord | None],
        on_replies: OnReplies = no_op,
    ) -> list[Answer]:
        messages = pack_messages(messages, DOWN[self.wire])
        sizes = [count_bytes(message.content) for message in messages]
        self.sent_bytes += sum(sizes)
        replies = self._deliver(messages, on_replies)
        answers = []
        for message, start, sent in zip(messages, starts, sizes, strict=True):
            node = message.metadata.dst_node_id
            reply = replies.get(message.metadata.message_id)
            if reply is None:
                late = f"no reply within {self.patience.timeout_s:g} s"
                answers.append(Answer(node, None, late, absent=True))
            elif reply.has_error():
                absent = reply.error.code in ABSENCES
                answers.append(Answer(node, None, explain(reply.error), absent))
            else:
                self.received_bytes += count_bytes(reply.content)
                answers.append(_unpack(node, reply, sent + MORE_BYTES, start))
        return answers

    def _deliver(self, messages: list[Message], on_replies: OnReplies) -> dict[str, Message]:
        """Send messages and collect replies by the ids of the messages.

        The grid's own method waits three seconds between two looks when it goes over HTTP.
        """
        waiting = {each for each in self.grid.push_messages(messages) if each}
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


def _arrays_of(message: Message) -> ArrayRecord | None:
    arrays = message.content.get(ARRAYS)
    return arrays if isinstance(arrays, ArrayRecord) else None


def _unpack(node: int, reply: Message, most: int, start: ArrayRecord | None) -> Answer:
    """Take the arrays of a reply out of their packing, or say why that can't be done."""
    try:
        unpack_reply(reply, most, start)
    except ValueError as error:
        return Answer(node, None, str(error))
    return Answer(node, reply)
