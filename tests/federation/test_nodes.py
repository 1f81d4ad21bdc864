"""Who is connected, who holds what, who is waited for: against a grid of scripted nodes."""

from threading import Event

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from fedssl.federation import nodes
from fedssl.federation.messages import is_packed, pack_arrays
from fedssl.federation.nodes import Nodes, Patience, explain, no_op

# Flower sets these before it runs an app; a message can't be made without them.
TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1


class Grid:
    """Nodes by id: a partition, an Error to reply with, or None for silence."""

    def __init__(self, **held):
        self.held = {int(name.removeprefix("n")): value for name, value in held.items()}
        self.asked, self.replies = [], []

    def get_node_ids(self):
        return list(self.held)

    def push_messages(self, messages):
        self.replies = []
        for number, message in enumerate(messages):
            message.metadata.__dict__["_message_id"] = str(number)
            node = message.metadata.dst_node_id
            self.asked.append(node)
            value = self.held.get(node)
            if isinstance(value, Error):
                self.replies.append(Message(value, reply_to=message))
            elif value is not None:
                metrics = MetricRecord({"partition-id": value})
                self.replies.append(Message(RecordDict({"metrics": metrics}), reply_to=message))
        return [str(number) for number in range(len(messages))]

    def pull_messages(self, message_ids):
        """Give one reply at a time, as they come in."""
        assert message_ids
        return [self.replies.pop()] if self.replies else []


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(nodes, "REPLY_POLL_S", 0.01)


def make_nodes(grid, least, wait_s=0, timeout_s=7, report=no_op, participants=(), stop=None):
    patience = Patience(least, wait_s, timeout_s, frozenset(participants))
    return Nodes(grid, patience, report, stop)


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


def test_too_few_nodes_end_the_wait_with_a_line(monkeypatch):
    monkeypatch.setattr(nodes, "POLL_S", 0.01)
    told = []
    known = make_nodes(Grid(n1=0), 3, 0.2, 7, told.append)
    with pytest.raises(RuntimeError, match=r"1 of 3 nodes are connected after waiting 0.2 s"):
        known.wait_for_clients()
    assert told[0] == "1 of 3 nodes are connected; waiting at most 0 s for the others"


def test_a_node_that_comes_late_is_waited_for(monkeypatch):
    monkeypatch.setattr(nodes, "POLL_S", 0.01)
    grid = Grid(n1=0)
    known = make_nodes(grid, 2, 5, 7, lambda line: grid.held.update({2: 1}))
    known.wait_for_clients()
    assert known.get_node_ids() == [1, 2]


def test_two_nodes_with_one_partition_are_refused():
    with pytest.raises(RuntimeError, match="two nodes hold partition 4"):
        make_nodes(Grid(n1=4, n2=4), 2).wait_for_clients()


def test_a_node_that_comes_back_replaces_itself():
    told = []
    grid = Grid(n1=0, n2=1)
    known = make_nodes(grid, 2, 0, 7, told.append)
    known.wait_for_clients()
    grid.held[9] = 1  # the dead node 2 still counts as connected for a while
    known.wait_for_clients()
    assert known.get_node_ids() == [1, 9]
    assert told[-1] == "partition 1 is connected again, at a new node"


def test_a_client_that_cannot_take_part_ends_the_run_before_it_starts():
    failure = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "<class 'X'>:<'partition 1: no image'>")
    with pytest.raises(RuntimeError, match=r"can't take part: partition 1: no image$"):
        make_nodes(Grid(n1=0, n2=failure), 2).wait_for_clients()


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
