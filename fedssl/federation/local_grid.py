"""A federation in this process: messages are answered as they are sent, one after the other."""

from collections.abc import Iterable
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity


class LocalGrid:
    """A Grid of clients without processes, for trials and tests; node ids follow the partitions."""

    def __init__(self, clients: ClientApp, num_partitions: int) -> None:
        """Make a node for each partition."""
        # Flower sets these before it runs an app; a message can't be made without them.
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
        self.clients = clients
        self.contexts = {
            self.node_of(number): Context(
                run_id=1,
                node_id=self.node_of(number),
                node_config={"partition-id": number, "num-partitions": num_partitions},
                state=RecordDict(),
                run_config={},
            )
            for number in range(num_partitions)
        }
        self._replies: list[Message] = []

    def node_of(self, partition: int) -> int:
        """Number the node of a partition."""
        return partition + 1

    def get_node_ids(self) -> list[int]:
        """List all nodes."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Answer messages at once; give their ids."""
        ids = []
        for number, message in enumerate(messages):
            _set_metadata(message, "_message_id", str(number))
            context = self.contexts[message.metadata.dst_node_id]
            self._replies.append(self.answer(message, context))
            ids.append(str(number))
        return ids

    def answer(self, message: Message, context: Context) -> Message:
        """Let the client of a node answer a message."""
        return self.clients(message, context)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Give the replies to the last messages."""
        replies, self._replies = self._replies, []
        return replies


def _set_metadata(message: Message, name: str, value: Any) -> None:
    message.metadata.__dict__[name] = value
