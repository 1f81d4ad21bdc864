"""How soon Flower asks again for a part of a message that is still on its way.

A message is announced before its parts are there. Whoever asks too early, which on a fast network
is the rule, waits a second by default, then two, four, eight: longer than a model travels.
"""

from flwr.supercore.inflatable import inflatable_utils

FIRST_PAUSE_S = 0.05  # doubled with each further question, up to Flower's ten seconds
PULLS = ("pull_objects", "pull_and_inflate_object_from_tree")
PAUSE = "initial_backoff"


def pull_soon() -> None:
    """Let this process ask again soon, in place of Flower's first pause."""
    for name in PULLS:
        getattr(inflatable_utils, name).__kwdefaults__[PAUSE] = FIRST_PAUSE_S
