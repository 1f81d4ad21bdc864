"""Who is connected, who holds what, who is waited for: against a grid of scripted nodes."""

import pytest
from flwr.app import Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from fedssl.federation import nodes
from fedssl.federation.nodes import Nodes, explain

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


def ask(gathered):
    messages = [Message(RecordDict(), node, "train") for node in gathered.get_node_ids()]
    return gathered.ask(messages)


def test_nodes_come_in_the_order_of_their_partitions():
    gathered = Nodes(Grid(n8=1, n3=2, n5=0), 3, 0, 7)
    gathered.gather()
    assert gathered.get_node_ids() == [5, 8, 3]
    assert [answer.node for answer in ask(gathered)] == [5, 8, 3]


def test_known_nodes_are_not_greeted_again():
    gathered = Nodes(Grid(n1=0), 1, 0, 7)
    gathered.gather()
    gathered.gather()
    assert gathered.grid.asked == [1]


def test_too_few_nodes_end_the_wait_with_a_line(monkeypatch):
    monkeypatch.setattr(nodes, "POLL_S", 0.01)
    told = []
    gathered = Nodes(Grid(n1=0), 3, 0.2, 7, told.append)
    with pytest.raises(RuntimeError, match=r"1 of 3 nodes are connected after waiting 0.2 s"):
        gathered.gather()
    assert told[0] == "1 of 3 nodes are connected; waiting at most 0 s for the others"


def test_a_node_that_comes_late_is_waited_for(monkeypatch):
    monkeypatch.setattr(nodes, "POLL_S", 0.01)
    grid = Grid(n1=0)
    gathered = Nodes(grid, 2, 5, 7, lambda line: grid.held.update({2: 1}))
    gathered.gather()
    assert gathered.get_node_ids() == [1, 2]


def test_two_nodes_with_one_partition_are_refused():
    with pytest.raises(RuntimeError, match="two nodes hold partition 4"):
        Nodes(Grid(n1=4, n2=4), 2, 0, 7).gather()


def test_a_node_that_comes_back_replaces_itself():
    told = []
    grid = Grid(n1=0, n2=1)
    gathered = Nodes(grid, 2, 0, 7, told.append)
    gathered.gather()
    grid.held[9] = 1  # the dead node 2 still counts as connected for a while
    gathered.gather()
    assert gathered.get_node_ids() == [1, 9]
    assert told[-1] == "partition 1 is connected again, at a new node"


def test_a_client_that_cannot_take_part_ends_the_run_before_it_starts():
    failure = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "<class 'X'>:<'partition 1: no image'>")
    with pytest.raises(RuntimeError, match=r"can't take part: partition 1: no image$"):
        Nodes(Grid(n1=0, n2=failure), 2, 0, 7).gather()


@pytest.mark.parametrize(
    ("value", "reason"),
    [(None, "no reply within 0.3 s"), (Error(ErrorCode.NODE_UNAVAILABLE, "x"), "its node is gone")],
)
def test_absent_nodes_are_named_and_left_out_of_the_rest_of_the_round(value, reason):
    grid = Grid(n1=0, n2=1)
    gathered = Nodes(grid, 2, 0, 0.3)
    gathered.gather()
    grid.held[2] = value
    here, gone = ask(gathered)
    assert here.failure == ""
    assert gone.reply is None
    assert reason in gone.failure
    assert gathered.get_node_ids() == [1]
    gathered.gather()
    assert gathered.get_node_ids() == [1, 2]  # the next round asks it again


def test_replies_are_told_of_as_they_come_in():
    gathered = Nodes(Grid(n1=0, n2=1, n3=2), 3, 0, 7)
    gathered.gather()
    messages = [Message(RecordDict(), node, "train") for node in gathered.get_node_ids()]
    counts = []
    gathered.ask(messages, lambda replies: counts.append(len(replies)))
    assert counts == [0, 1, 2, 3]


def test_a_client_that_failed_stays_in_the_round():
    grid = Grid(n1=0, n2=1)
    gathered = Nodes(grid, 2, 0, 7)
    gathered.gather()
    grid.held[2] = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "<class 'X'>:<'out of memory'>")
    assert [answer.failure for answer in ask(gathered)] == ["", "out of memory"]
    assert gathered.get_node_ids() == [1, 2]


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
    gathered = Nodes(Grid(n1=0, n2=1), 2, 0, 7)
    gathered.gather()
    gathered.grid.held[2] = died
    gathered.grid.asked.clear()
    answers = ask(gathered)
    assert gathered.grid.asked == [1, 2, 2]
    assert answers[0].reply is not None
    assert answers[1].failure == nodes.DIED
    assert gathered.get_node_ids() == [1, 2]  # it is asked again in the next round


def test_only_participants_are_asked():
    grid = Grid(n8=1, n3=2, n5=0)
    gathered = Nodes(grid, 3, 0, 7, participants=[2, 0])
    gathered.gather()
    assert gathered.get_node_ids() == [5, 3]
    assert [answer.node for answer in ask(gathered)] == [5, 3]
