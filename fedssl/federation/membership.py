"""Who belongs to a run: which node holds which partition, who is refused, and why."""

import re
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from flwr.app import Message, MessageType, RecordDict
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, HEARTBEAT_PATIENCE
from flwr.serverapp import Grid

from fedssl.config.roster import Member
from fedssl.errors import name_some
from fedssl.federation.messages import ABSENCES, METRICS, explain
from fedssl.runs.metrics import NodeEvent

CLAIMED = re.compile(r"partition (\d+): ")  # begins what a client says of its failure
ANY_KEY = b""  # of nodes whose keys nobody looks at
RETRY_S = 30.0  # between two questions to a node that is refused
# So long a node that died may still count as connected.
STALE_S = 5.0 + HEARTBEAT_PATIENCE * HEARTBEAT_DEFAULT_INTERVAL


@dataclass(frozen=True)
class Patience:
    """How many clients a round needs, and how long it waits for them.

    Attributes:
        min_nodes: how many must be connected before a round starts.
        wait_s: how long to wait for them.
        timeout_s: how long to wait for replies.
        participants: partitions that are asked; empty for all.
        num_clients: as many as there should be; fewer don't keep a round from starting.
    """

    min_nodes: int
    wait_s: float
    timeout_s: float
    participants: frozenset[int] = frozenset()
    num_clients: int = 0


@dataclass(frozen=True)
class Claim:
    """What a node answered when it was asked which partition it holds.

    Attributes:
        partition: None where it can't take part.
        failure: why it can't.
        is_late: it has not answered yet, and perhaps can.
    """

    node: int
    partition: int | None
    failure: str = ""
    is_late: bool = False


class Membership:
    """Keeps who holds what over the rounds; Flower knows nodes only by random numbers.

    A partition belongs to its holder as long as that is connected. Where there is a
    roster, it belongs to the key that the roster names, connected or not.
    """

    def __init__(
        self, roster: Sequence[Member] = (), known: Mapping[int, int] | None = None
    ) -> None:
        """Start without having met any node.

        Args:
            roster: the nodes that may take part; empty for any.
            known: partitions of nodes that need not be asked: those of a simulation.
        """
        self.known = known or {}
        self.members = {member.flower_key: member for member in roster}
        self.names = {member.partition: member.name for member in roster}
        self.partition_of: dict[int, int] = {}  # also of nodes that are gone
        self.holders: dict[int, int] = {}
        self.connected: Mapping[int, bytes] = {}
        self._held: set[int] = set()  # partitions that had a holder at some time
        self._refused: dict[int, NodeEvent] = {}
        self.failed: set[int] = set()  # refused nodes that can't take part
        self._for_good: set[int] = set()  # nodes that nothing they answer can help
        self._events: list[NodeEvent] = []

    def see(self, connected: Mapping[int, bytes]) -> None:
        """Note who is connected: nodes and their keys, the oldest first."""
        self.connected = connected
        for partition, node in sorted(self.holders.items()):
            if node not in connected:
                del self.holders[partition]
                self._tell("left", partition)
        mine = {self.known[node]: node for node in connected.keys() & self.known.keys()}
        self.holders |= mine
        self.partition_of |= {node: partition for partition, node in mine.items()}
        self._held |= mine.keys()
        self._refused = {node: e for node, e in self._refused.items() if node in connected}
        self._for_good = set()
        self.failed &= connected.keys()
        newest = {key: node for node, key in connected.items() if key}
        holding = set(self.holders.values())
        for node, key in connected.items():
            if newest.get(key, node) != node and node not in holding:
                self._for_good.add(node)  # what is left of a node that came back
            elif self.members and key not in self.members:
                self._for_good.add(node)
                self._refuse(node, None, "its key is not in nodes_file")

    def candidates(self) -> list[int]:
        """List the connected nodes that take part, or might."""
        others = self._for_good | self._refused.keys()
        return [node for node in self.connected if node not in others]

    def newcomers(self) -> list[int]:
        """List the nodes that have to be asked which partition they hold."""
        holding = set(self.holders.values())
        return [node for node in self.candidates() if node not in holding]

    def refused(self) -> list[int]:
        """List the refused nodes that might answer something else by now."""
        return [node for node in self._refused if node not in self._for_good]

    def present(self) -> list[int]:
        """List the nodes that take part, in the order of their partitions."""
        return [self.holders[partition] for partition in sorted(self.holders)]

    def missing(self, num_clients: int) -> list[int]:
        """List the partitions without a holder, as far as they can be known."""
        known = set(self.names) or set(range(num_clients))
        if not self.names and not self.holders.keys() <= known:  # numbered in their own way
            known = set()
        return sorted((known | self._held) - self.holders.keys())

    def find_twice(self, claims: Iterable[Claim]) -> int | None:
        """Find a partition that several new nodes claim, though the roster doesn't decide."""
        if self.members:
            return None
        counts = Counter(claim.partition for claim in claims if claim.partition is not None)
        return next((partition for partition, count in counts.items() if count > 1), None)

    def holder_of(self, claim: Claim) -> int | None:
        """Give the connected node that keeps a claim from being granted, if one does."""
        holder = None if claim.partition is None else self.holders.get(claim.partition)
        key = self.connected.get(claim.node, ANY_KEY)
        same = holder is not None and key and key == self.connected.get(holder)
        return None if holder in (None, claim.node) or same else holder

    def decide(self, claim: Claim) -> None:
        """Give a node its partition, or refuse it."""
        if claim.node not in self.connected:
            return
        member = self.members.get(self.connected[claim.node])
        self.failed.discard(claim.node)
        if claim.partition is None:
            if not claim.is_late:
                self.failed.add(claim.node)
            told = CLAIMED.match(claim.failure)
            own = member.partition if member else int(told[1]) if told else None
            self._refuse(claim.node, own, claim.failure[told.end() if told else 0 :])
        elif member and claim.partition != member.partition:
            reason = f"nodes_file gives it partition {member.partition}, it holds {claim.partition}"
            self._refuse(claim.node, member.partition, reason)
        elif self.holder_of(claim) is not None:
            self._refuse(claim.node, claim.partition, "another node holds it and is connected")
        else:
            self._admit(claim.node, claim.partition)

    def _admit(self, node: int, partition: int) -> None:
        self._refused.pop(node, None)
        self.partition_of[node] = partition
        self.holders[partition] = node
        self._tell("back" if partition in self._held else "joined", partition)
        self._held.add(partition)

    def _refuse(self, node: int, partition: int | None, reason: str) -> None:
        """Refuse a node; say so unless it is refused for the same reason already."""
        event = NodeEvent("refused", partition, self.name_of(partition), reason)
        if self._refused.get(node) != event and event not in self._events:
            self._events.append(event)
        self._refused[node] = event

    def _tell(self, event: str, partition: int) -> None:
        self._events.append(NodeEvent(event, partition, self.name_of(partition)))

    def name_of(self, partition: int | None) -> str | None:
        """Give the name that the roster has for a partition's node."""
        return None if partition is None else self.names.get(partition)

    def label(self, partition: int) -> str:
        """Name a partition's node, or the partition."""
        return self.names.get(partition, f"partition {partition}")

    def describe(self, num_clients: int) -> str:
        """Say which partitions have a node and which lack one, in a line."""
        there = name_some([self.label(partition) for partition in sorted(self.holders)])
        missing = name_some([self.label(partition) for partition in self.missing(num_clients)])
        return f"there: {there}; missing: {missing or 'unknown'}"

    def describe_refusals(self) -> str:
        """Say who is refused and why, for the end of a line; nothing if nobody is."""
        told = list(dict.fromkeys(f"{e.who}: {e.reason}" for e in self._refused.values()))
        return f"; refused: {name_some(told)}" if told else ""

    def take_events(self) -> list[NodeEvent]:
        """Give what happened since the last call."""
        events, self._events = self._events, []
        return events


@dataclass(frozen=True)
class Query:
    """A question to a node which partition it holds, on its way.

    Attributes:
        asked: when, on the monotonic clock.
        awaited: a round waits for the answer.
        is_late: it is not there in time; it counts when it comes.
    """

    node: int
    asked: float
    awaited: bool = True
    is_late: bool = False


class Registration:
    """Asks new nodes which partition they hold, and grants or refuses it.

    A running round is never held up: answers are looked for as often as `update` is called.
    """

    def __init__(self, grid: Grid, patience: Patience, membership: Membership) -> None:
        """Start without having asked any."""
        self.grid, self.patience, self.membership = grid, patience, membership
        self.started = False  # the first round has its clients
        self._queries: dict[str, Query] = {}  # by the ids of their messages
        self._claims: list[Claim] = []  # that are not decided
        self._last_asked: dict[int, float] = {}

    @property
    def is_waiting(self) -> bool:
        """Whether a node is asked that has not answered."""
        return bool(self._queries)

    @property
    def is_open(self) -> bool:
        """Whether an answer or a decision is due that a new round would rather have."""
        awaited = any(query.awaited for query in self._queries.values())
        return bool(self._claims) or (awaited and (not self.started or self._lacks_clients()))

    def update(self, silent: Collection[int], until: float) -> None:
        """Look who is connected, ask who is new, decide about those who have answered.

        Args:
            silent: nodes that did not answer in the last round, and are perhaps gone.
            until: who claims the partition of one of them waits so long for its place.

        Raises:
            RuntimeError: before the first round, two nodes hold the same partition.
        """
        self.membership.see(self._list_connected())
        self._ask()
        self._collect()
        if self.started or not any(query.awaited for query in self._queries.values()):
            self._decide(silent, until)

    def start(self) -> None:
        """Begin a round, which has waited for those who were asked."""
        self.started = True
        self._queries = {key: replace(q, awaited=False) for key, q in self._queries.items()}

    def _list_connected(self) -> dict[int, bytes]:
        """List the connected nodes and, where these decide, their keys, the oldest first."""
        if not self.membership.members:
            return dict.fromkeys(self.grid.get_node_ids(), ANY_KEY)
        nodes = sorted(self.grid.get_nodes(), key=lambda node: node.registered_at)
        return {node.node_id: node.public_key for node in nodes}

    def _lacks_clients(self) -> bool:
        members, patience = self.membership, self.patience
        expected = max(patience.min_nodes, patience.num_clients)
        return len(members.holders) < expected or bool(members.missing(0))

    def _ask(self) -> None:
        """Ask new nodes which partition they hold; they check their images meanwhile.

        Before the first round, once there may be enough of them. The refused are asked
        again while clients are missing.
        """
        members, now = self.membership, time.monotonic()
        here = members.connected
        self._queries = {key: query for key, query in self._queries.items() if query.node in here}
        busy = {query.node for query in self._queries.values()}
        busy |= {claim.node for claim in self._claims}
        new, again = set[int](), set[int]()
        if self.started or len(members.candidates()) >= self.patience.min_nodes:
            new = set(members.newcomers())
        if self._lacks_clients():
            again = {n for n in members.refused() if now >= self._last_asked.get(n, 0.0) + RETRY_S}
        asked = [node for node in here if node in (new | again) - busy]
        messages = [Message(RecordDict(), node, MessageType.QUERY) for node in asked]
        if messages:
            self.grid.push_messages(messages)
        for node, message in zip(asked, messages, strict=True):
            self._last_asked[node] = now
            self._queries[message.metadata.message_id] = Query(node, now, awaited=node in new)

    def _collect(self) -> None:
        """Take in what nodes have answered."""
        if not self._queries:
            return
        for reply in self.grid.pull_messages(set(self._queries)):
            query = self._queries.pop(reply.metadata.reply_to_message_id, None)
            if query is None:
                continue
            if not reply.has_error():
                self._claims.append(_read_claim(query.node, reply))
            elif reply.error.code not in ABSENCES:  # else it is gone again
                self._claims.append(Claim(query.node, None, explain(reply.error)))
        timeout_s = self.patience.timeout_s
        for key, query in list(self._queries.items()):
            if not query.is_late and time.monotonic() >= query.asked + timeout_s:
                self._queries[key] = replace(query, awaited=False, is_late=True)
                failure = f"no reply within {timeout_s:g} s"
                self._claims.append(Claim(query.node, None, failure, is_late=True))

    def _decide(self, silent: Collection[int], until: float) -> None:
        if not self.started and (twice := self.membership.find_twice(self._claims)) is not None:
            raise RuntimeError(f"two nodes hold partition {twice}; give each its own partition-id")
        waiting = []
        for claim in sorted(self._claims, key=lambda c: (c.partition is None, c.partition or 0)):
            holder = self.membership.holder_of(claim)
            if holder in silent and time.monotonic() < until:
                waiting.append(claim)
            else:
                self.membership.decide(claim)
        self._claims = waiting


def _read_claim(node: int, reply: Message) -> Claim:
    """Read which partition a node says it holds."""
    try:
        partition = int(str(reply.content.metric_records[METRICS]["partition-id"]))
    except (KeyError, ValueError):
        return Claim(node, None, "it does not say which partition it holds")
    if partition < 0:
        return Claim(node, None, f"partition-id={partition}: must be at least 0")
    return Claim(node, partition)
