"""A federation in this process whose nodes answer in any order, and may tamper."""

import random

from client import make_client_app, simulated
from fedssl.federation.local_grid import LocalGrid
from fedssl.federation.messages import read_state, write_state

FAST = "model.stem=imagenet"  # digits shrink to a point at once: little to compute


class ShuffledGrid(LocalGrid):
    """Nodes with random ids that answer in random order."""

    def __init__(self, config, tamper=lambda partition, reply: reply):
        self.ids = random.SystemRandom().sample(range(1, 10**6), config.num_clients)
        self.asked = []

        def tampering(message, context, call_next):
            reply = call_next(message, context)
            trained = message.metadata.message_type == "train"
            return tamper(context.node_config["partition-id"], reply) if trained else reply

        super().__init__(make_client_app(simulated(config), [tampering]), config.num_clients)

    def node_of(self, partition):
        return self.ids[partition]

    def get_node_ids(self):
        return random.SystemRandom().sample(self.ids, len(self.ids))

    def answer(self, message, context):
        if message.metadata.message_type != "query":
            partition = context.node_config["partition-id"]
            self.asked.append((message.metadata.message_type, partition))
        return super().answer(message, context)

    def pull_messages(self, message_ids):
        replies = super().pull_messages(message_ids)
        return random.SystemRandom().sample(replies, len(replies))


def change(reply, how):
    """Change the tensors of a training reply in place, by name."""
    names, state = list(reply.content["arrays"]), read_state(reply.content)
    how(state)
    for name, record in write_state(state, names).items():
        reply.content[name] = record
    return reply
