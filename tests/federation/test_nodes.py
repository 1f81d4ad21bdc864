"""Who is connected, who holds what, who is waited for: against a grid of scripted nodes."""

import re
from threading import Event

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedssl.config.roster import Member
from fedssl.federation import membership, messages, nodes
from fedssl.federation.membership import Membership, Patience
from fedssl.federation.messages import explain, is_packed, pack_arrays
from fedssl.federation.nodes import Nodes, no_op
from fedssl.runs.metrics import NodeEvent


class Grid:
    """Nodes by id: a partition, an Error to reply with, or None for silence.

    The nodes of `keys` show these; others show none.
    """

    def __init__(self, keys=None, **held):
        self.held = {int(name.removeprefix("n")): value for name, value in held.items()}
        self.keys = keys or {}
        self.asked, self.replies, self.pushed = [], [], 0

    def get_node_ids(self):
        return list(self.held)

    def get_nodes(self):
        return [
            NodeInfo(node_id=node, public_key=self.keys.get(node, b""), registered_at=f"{place:03}")
            for place, node in enumerate(self.held)
        ][::-1]

    def push_messages(self, messages):
        for message in messages:
            self.pushed += 1
            message.metadata.__dict__["_message_id"] = str(self.pushed)
            node = message.metadata.dst_node_id
            self.asked.append(node)
            value = self.held.get(node)
            if isinstance(value, Error):
                self.replies.append(Message(value, reply_to=message))
            elif value is not None:
                metrics = MetricRecord({"partition-id": value})
                self.replies.append(Message(RecordDict({"metrics": metrics}), reply_to=message))
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids):
        """Give one reply at a time, as they come in."""
        assert message_ids
        for reply in reversed(self.replies):
            if reply.metadata.reply_to_message_id in message_ids:
                self.replies.remove(reply)
                return [reply]
        return []


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(nodes, "REPLY_POLL_S", 0.01)
    monkeypatch.setattr(nodes, "POLL_S", 0.01)


def make_nodes(
    grid,
    least,
    wait_s=0,
    timeout_s=7,
    report=no_op,
    participants=(),
    stop=None,
    count=0,
    roster=(),
):
    patience = Patience(least, wait_s, timeout_s, frozenset(participants), count)
    return Nodes(grid, patience, report, stop, Membership(roster))


def ask(known):
    messages = [Message(RecordDict(), node, "train") for node in known.get_node_ids()]
    return known.send_and_receive(messages)


def test_nodes_come_in_the_order_of_their_partitions():
    known = make_nodes(Grid(n8=1, n3=2, n5=0), 3, 0, 7)
    known.wait_for_clients()
    assert known.get_node_ids() == [5, 8, 3]
    assert [answer.node for answer in ask(known)] == [5, 8, 3]


def test_known_nodes_are_not_asked_who_they_are_again():
    known = make_nodes(Grid(n1=0), 1, 0, 7)
    known.wait_for_clients()
    known.wait_for_clients()
    assert known.grid.asked == [1]


def test_too_few_nodes_end_the_wait_with_a_line():
    told = []
    known = make_nodes(Grid(n1=0), 3, 0.2, 7, told.append)
    with pytest.raises(RuntimeError, match=r"1 of 3 nodes are connected after waiting 0.2 s"):
        known.wait_for_clients()
    assert told[0] == "1 of 3 nodes are connected; waiting at most 0 s for the others"


def test_a_node_that_comes_late_is_waited_for():
    grid = Grid(n1=0)
    known = make_nodes(grid, 2, 5, 7, lambda line: grid.held.update({2: 1}))
    known.wait_for_clients()
    assert known.get_node_ids() == [1, 2]


def test_two_nodes_with_one_partition_are_refused():
    with pytest.raises(RuntimeError, match="two nodes hold partition 4"):
        make_nodes(Grid(n1=4, n2=4), 2).wait_for_clients()


FAILED = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "<class 'X'>:<'partition 1: no image'>")
HELD = "another node holds it and is connected"


def test_a_client_that_cannot_take_part_ends_a_run_that_cannot_start_without_it():
    with pytest.raises(RuntimeError, match=r"can't take part: partition 1: no image$"):
        make_nodes(Grid(n1=0, n2=FAILED), 2, wait_s=60).wait_for_clients()


def test_a_client_that_cannot_take_part_is_left_out_of_a_run_that_has_enough_others():
    known = make_nodes(Grid(n1=0, n2=FAILED, n3=2), 2)
    known.wait_for_clients()
    assert known.get_node_ids() == [1, 3]
    assert NodeEvent("refused", 1, None, "no image") in known.take_events()


def start(grid, least=2, **settings):
    """Begin a run; give its nodes and what they report from then on."""
    told = []
    known = make_nodes(grid, least, report=told.append, **settings)
    known.wait_for_clients()
    known.take_events()
    told.clear()
    return known, told


def test_who_joins_leaves_and_comes_back_is_told_once():
    told = []
    grid = Grid(n1=0, n2=1)
    known = make_nodes(grid, 1, report=told.append)
    known.wait_for_clients()
    assert known.take_events() == (NodeEvent("joined", 0), NodeEvent("joined", 1))
    del grid.held[2]
    known.wait_for_clients()
    known.wait_for_clients()
    assert known.get_node_ids() == [1]
    assert known.take_events() == (NodeEvent("left", 1),)
    grid.held[9] = 1
    known.wait_for_clients()
    assert known.get_node_ids() == [1, 9]
    assert known.take_events() == (NodeEvent("back", 1),)
    assert [line for line in told if "partition 1" in line] == [
        "partition 1 is connected",
        "partition 1 is gone",
        "partition 1 is connected again",
    ]


def test_a_partition_stays_with_its_node_while_that_is_connected():
    grid = Grid(n1=0, n2=1)
    known, told = start(grid)
    grid.held[9] = 1
    for _ in range(3):  # it need not have answered before the first
        known.wait_for_clients()
    assert known.get_node_ids() == [1, 2]
    assert told == [f"partition 1 is refused: {HELD}"]
    assert known.take_events() == (NodeEvent("refused", 1, None, HELD),)
    assert grid.asked == [1, 2, 9]  # a refused node costs later rounds nothing


def test_a_refused_node_takes_the_partition_over_when_its_holder_is_gone(monkeypatch):
    monkeypatch.setattr(membership, "RETRY_S", 0.05)
    grid = Grid(n1=0, n2=1)
    known, told = start(grid, wait_s=5)
    grid.held[9] = 1
    for _ in range(2):
        known.wait_for_clients()
    del grid.held[2]
    known.wait_for_clients()
    assert known.get_node_ids() == [1, 9]
    assert told[1] == "partition 1 is gone"
    assert told[-1] == "partition 1 is connected again"


def silence(known, grid, node):
    """Let a node miss a round."""
    partition, grid.held[node] = grid.held[node], None
    known.patience = Patience(known.patience.min_nodes, known.patience.wait_s, 0.05)
    ask(known)
    grid.held[node] = partition


@pytest.mark.parametrize("dead", [True, False])
def test_a_newcomer_waits_whether_the_silent_holder_of_its_partition_is_dead(dead, monkeypatch):
    monkeypatch.setattr(nodes, "STALE_S", 0.3)
    grid = Grid(n1=0, n2=1)
    known, _ = start(grid, wait_s=5)
    silence(known, grid, 2)
    grid.held[9] = 1
    looks = []

    def get_node_ids():
        looks.append(1)
        if dead and len(looks) > 8:
            grid.held.pop(2, None)
        return list(grid.held)

    grid.get_node_ids = get_node_ids
    known.wait_for_clients()
    assert known.get_node_ids() == ([1, 9] if dead else [1, 2])


def test_two_newcomers_with_one_partition_get_it_once():
    grid = Grid(n1=0, n2=1)
    known, told = start(grid, least=1, count=3, wait_s=5)
    grid.held |= {8: 2, 9: 2}
    known.wait_for_clients()
    known.wait_for_clients()
    assert len(known.get_node_ids()) == 3
    assert told == ["partition 2 is connected", f"partition 2 is refused: {HELD}"]


@pytest.mark.parametrize("count", [2, 3])
def test_a_newcomer_that_cannot_take_part_does_not_end_the_run(count):
    grid = Grid(n1=0, n2=1)
    known, told = start(grid, count=count, wait_s=5)
    grid.held[9] = Error(
        ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "<class 'X'>:<'partition 2: 1 image is too few'>"
    )
    for _ in range(3):
        known.wait_for_clients()
    assert known.get_node_ids() == [1, 2]
    assert told == ["partition 2 is refused: 1 image is too few"]
    assert grid.asked.count(9) == 1


def test_a_full_round_does_not_wait_for_a_newcomer_that_says_nothing():
    grid = Grid(n1=0, n2=1)
    known, told = start(grid, wait_s=60, timeout_s=60)
    grid.held[9] = None
    known.wait_for_clients()
    assert known.get_node_ids() == [1, 2]
    assert told == []


def test_an_incomplete_round_waits_for_a_newcomer_no_longer_than_for_a_node():
    grid = Grid(n1=0, n2=1)
    known, told = start(grid, count=3, wait_s=0.2, timeout_s=0.4)
    grid.held[9] = None
    known.wait_for_clients()
    known.wait_for_clients()  # once is enough
    assert known.get_node_ids() == [1, 2]
    while not any("refused" in line for line in told):
        known.wait_for_clients()
    assert told[-1] == "a node is refused: no reply within 0.4 s"


def test_a_late_answer_counts_when_it_comes():
    """Images may be decoded for longer than a round waits for replies."""
    grid = Grid(n1=0, n2=1)
    told = []

    def slow(messages, push=grid.push_messages):
        ids = push(messages)
        late.extend(grid.replies)
        grid.replies.clear()
        return ids

    def answer(line):
        told.append(line)
        if "refused" in line:
            grid.replies.extend(late)

    late, grid.push_messages = [], slow
    known = make_nodes(grid, 2, wait_s=5, timeout_s=0.2, report=answer)
    known.wait_for_clients()
    assert known.get_node_ids() == [1, 2]
    assert told[0] == "2 of 2 nodes are connected; waiting for their answers"
    assert "a node is refused: no reply within 0.2 s" in told
    assert sorted(told[-2:]) == ["partition 0 is connected", "partition 1 is connected"]
    assert grid.asked == [1, 2]


def test_the_wait_names_the_partitions_that_are_there_missing_and_refused(monkeypatch):
    grid = Grid(n1=0, n2=1, n3=2)
    known, told = start(grid, least=3, wait_s=0.3, count=3)
    del grid.held[3]
    grid.held[9] = 1
    with pytest.raises(RuntimeError) as caught:
        known.wait_for_clients()
    there = "2 of 3 nodes take part (there: partition 0, partition 1; missing: partition 2)"
    refused = f"; refused: partition 1: {HELD}"
    assert any(re.fullmatch(f"{re.escape(there)}; waiting .*{re.escape(refused)}", t) for t in told)
    assert str(caught.value).startswith(f"{there} after waiting 0.3 s; start the others")
    assert str(caught.value).endswith(refused)


def test_a_node_that_names_no_partition_is_refused():
    known = make_nodes(Grid(n1=0, n2=-3), 1)
    known.wait_for_clients()
    assert known.get_node_ids() == [1]
    assert known.take_events()[1].reason == "partition-id=-3: must be at least 0"


KEYS = [ec.generate_private_key(ec.SECP384R1()).public_key() for _ in range(4)]
SHOWN = [public_key_to_bytes(key) for key in KEYS]  # as Flower keeps them
ROSTER = [
    Member(number, name, key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode())
    for number, (name, key) in enumerate(zip(("north", "south"), KEYS, strict=False))
]


def pinned(**held):
    """Two nodes of the roster, and perhaps others."""
    return Grid({1: SHOWN[0], 2: SHOWN[1]}, **{"n1": 0, "n2": 1, **held})


def test_nodes_of_a_roster_have_names():
    told = []
    known = make_nodes(pinned(), 2, report=told.append, roster=ROSTER)
    known.wait_for_clients()
    assert told == ["north (partition 0) is connected", "south (partition 1) is connected"]
    assert known.take_events()[1] == NodeEvent("joined", 1, "south")
    assert known.membership.names == {0: "north", 1: "south"}


@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("key", [SHOWN[2], b""])
def test_a_stranger_to_the_roster_is_refused_without_a_question(key, started):
    grid = pinned()
    known = make_nodes(grid, 2, roster=ROSTER)
    if started:
        known.wait_for_clients()
    grid.held[9], grid.keys[9] = 0, key
    known.wait_for_clients()
    known.wait_for_clients()
    assert known.get_node_ids() == [1, 2]
    assert sorted(grid.asked) == [1, 2]
    refused = NodeEvent("refused", None, None, "its key is not in nodes_file")
    assert known.take_events().count(refused) == 1


def test_strangers_do_not_count_as_connected():
    grid = pinned(n9=1)
    del grid.held[2]
    with pytest.raises(RuntimeError, match=r"^1 of 2 nodes are connected .*a node: its key is not"):
        make_nodes(grid, 2, roster=ROSTER).wait_for_clients()
    assert grid.asked == []


def test_a_key_has_its_own_partition_alone():
    grid = pinned(n2=0)
    told = []
    with pytest.raises(RuntimeError) as caught:
        make_nodes(grid, 2, wait_s=0.1, report=told.append, roster=ROSTER).wait_for_clients()
    reason = "nodes_file gives it partition 1, it holds 0"
    assert f"south (partition 1) is refused: {reason}" in told
    assert "(there: north; missing: south)" in str(caught.value)
    assert str(caught.value).endswith(f"; refused: south (partition 1): {reason}")


def test_a_pinned_node_that_restarts_gets_its_partition_back_beside_its_old_self():
    grid = pinned()
    known, told = start(grid, roster=ROSTER)
    grid.held[9], grid.keys[9] = 1, SHOWN[1]
    for _ in range(2):
        known.wait_for_clients()
    assert known.get_node_ids() == [1, 9]
    assert told == ["south (partition 1) is connected again"]
    for _ in range(2):
        known.wait_for_clients()
    assert grid.asked == [1, 2, 9]  # what is left of its old self is left alone
    del grid.held[2]
    known.wait_for_clients()
    assert known.get_node_ids() == [1, 9]
    assert len(told) == 1


def test_the_older_of_two_nodes_with_one_key_counts_again_when_the_newer_is_gone():
    grid = pinned()
    known, told = start(grid, roster=ROSTER, wait_s=5)
    grid.held[9], grid.keys[9] = 1, SHOWN[1]
    for _ in range(2):
        known.wait_for_clients()
    del grid.held[9]
    known.wait_for_clients()
    assert known.get_node_ids() == [1, 2]
    assert told[-1] == "south (partition 1) is connected again"


def test_of_two_nodes_with_one_key_the_newest_counts_at_the_start():
    grid = pinned(n9=1)
    grid.keys[9] = SHOWN[1]
    known = make_nodes(grid, 2, roster=ROSTER)
    known.wait_for_clients()
    assert known.get_node_ids() == [1, 9]
    assert sorted(grid.asked) == [1, 9]


def test_a_pinned_client_that_cannot_take_part_is_named():
    grid = pinned(n2=FAILED)
    with pytest.raises(RuntimeError, match=r"take part: south \(partition 1\): no image$"):
        make_nodes(grid, 2, roster=ROSTER).wait_for_clients()


@pytest.mark.parametrize(
    ("value", "reason"),
    [(None, "no reply within 0.3 s"), (Error(ErrorCode.NODE_UNAVAILABLE, "x"), "its node is gone")],
)
def test_absent_nodes_are_named_and_left_out_of_the_rest_of_the_round(value, reason):
    grid = Grid(n1=0, n2=1)
    known = make_nodes(grid, 2, 0, 0.3)
    known.wait_for_clients()
    grid.held[2] = value
    here, gone = ask(known)
    assert here.failure == ""
    assert gone.reply is None
    assert reason in gone.failure
    assert known.get_node_ids() == [1]
    known.wait_for_clients()
    assert known.get_node_ids() == [1, 2]  # the next round asks it again


def test_replies_are_told_of_as_they_come_in():
    known = make_nodes(Grid(n1=0, n2=1, n3=2), 3, 0, 7)
    known.wait_for_clients()
    messages = [Message(RecordDict(), node, "train") for node in known.get_node_ids()]
    counts = []
    known.send_and_receive(messages, lambda replies: counts.append(len(replies)))
    assert counts == [0, 1, 2, 3]


def test_a_client_that_failed_stays_in_the_round():
    grid = Grid(n1=0, n2=1)
    known = make_nodes(grid, 2, 0, 7)
    known.wait_for_clients()
    grid.held[2] = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "<class 'X'>:<'out of memory'>")
    assert [answer.failure for answer in ask(known)] == ["", "out of memory"]
    assert known.get_node_ids() == [1, 2]


@pytest.mark.parametrize(
    ("reason", "line"),
    [
        ("<class 'ValueError'>:<'too few'>", "too few"),
        ("one\ntwo", "one"),
        ("", "no reason given"),
        ("a\x1b[2Jb", "a?[2Jb"),
        ("x" * 900, "x" * messages.MAX_REASON),
        (None, "no reason given"),
    ],
)
def test_errors_are_explained_in_one_line(reason, line):
    assert explain(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)) == line


def test_a_client_whose_process_died_is_asked_once_more(monkeypatch):
    monkeypatch.setattr(nodes, "RESTART_S", 0.01)
    died = Error(ErrorCode.UNKNOWN, "<class 'ray.exceptions.ActorDiedError'>:<'gone'>")
    known = make_nodes(Grid(n1=0, n2=1), 2, 0, 7)
    known.wait_for_clients()
    known.grid.held[2] = died
    known.grid.asked.clear()
    answers = ask(known)
    assert known.grid.asked == [1, 2, 2]
    assert answers[0].reply is not None
    assert answers[1].failure == nodes.DIED
    assert known.get_node_ids() == [1, 2]  # it is asked again in the next round


def test_only_participants_are_asked():
    grid = Grid(n8=1, n3=2, n5=0)
    known = make_nodes(grid, 3, 0, 7, participants=[2, 0])
    known.wait_for_clients()
    assert known.get_node_ids() == [5, 3]
    assert [answer.node for answer in ask(known)] == [5, 3]


def test_waiting_ends_when_another_thread_says_so():
    stop = Event()
    stop.set()
    with pytest.raises(RuntimeError, match="stopped while waiting for clients"):
        make_nodes(Grid(), 1, wait_s=60, stop=stop).wait_for_clients()


class Echo(Grid):
    """Sends back what it got, as it came over the wire, perhaps changed."""

    def __init__(self, change=lambda arrays: arrays, **held):
        super().__init__(**held)
        self.change, self.seen = change, []

    def push_messages(self, messages):
        ids = super().push_messages(messages)
        for place, message in enumerate(messages):
            if arrays := message.content.get("arrays"):
                self.seen.append(arrays)
                content = RecordDict({"arrays": self.change(arrays)})
                self.replies[place] = Message(content, reply_to=message)
        return ids


@pytest.fixture
def requests():
    """Messages that share their content, as strategies make them."""
    arrays = ArrayRecord({"z": torch.ones(2), "a": torch.zeros(1)})
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": 1})})
    return lambda known: [Message(content, node, "train") for node in known.get_node_ids()]


def test_arrays_are_packed_on_the_way_once_and_plain_at_both_ends(requests):
    known = make_nodes(Echo(n1=0, n2=1), 2)
    known.wait_for_clients()
    messages = requests(known)
    shared = messages[0].content
    answers = known.send_and_receive(messages)
    first, second = known.grid.seen
    assert is_packed(first)
    assert first is second
    assert list(shared["arrays"]) == ["z", "a"]  # what the strategy holds stays plain
    for answer in answers:
        assert list(answer.reply.content["arrays"]) == ["z", "a"]


def test_arrays_that_cannot_be_unpacked_are_a_failure_of_that_client(requests):
    known = make_nodes(Echo(lambda arrays: ArrayRecord({"z": torch.ones(2)}), n1=0), 1)
    known.wait_for_clients()
    (answer,) = known.send_and_receive(requests(known))
    assert answer.reply is None
    assert answer.failure == "arrays ['z'] instead of 'safetensors'"
    assert known.get_node_ids() == [1]


def test_a_message_that_is_sent_again_is_packed_as_it_was(monkeypatch, requests):
    monkeypatch.setattr(nodes, "RESTART_S", 0.01)
    died = Error(ErrorCode.UNKNOWN, "<class 'ray.exceptions.ActorDiedError'>:<'gone'>")

    class DiesOnce(Echo):
        def push_messages(self, messages):
            ids = super().push_messages(messages)
            if len(self.seen) == 1:
                self.replies = [Message(died, reply_to=messages[0])]
            return ids

    known = make_nodes(DiesOnce(n1=0), 1)
    known.wait_for_clients()
    (answer,) = known.send_and_receive(requests(known))
    assert all(is_packed(arrays) for arrays in known.grid.seen)
    assert len(known.grid.seen) == 2
    assert list(answer.reply.content["arrays"]) == ["z", "a"]
    assert pack_arrays(answer.reply.content["arrays"]) == known.grid.seen[0]
