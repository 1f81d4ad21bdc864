"""The one exception that ends a program with a line instead of a traceback, and what warns."""

from collections.abc import Sequence

WARNING = "warning: "  # begins the reported lines that --quiet leaves
MAX_NAMES = 5  # of files, folders or clients, in messages


class UserError(Exception):
    """Something the user gave is wrong: one line with the value and the remedy.

    Attributes:
        public: what of it may leave the machine; None: nothing but its kind. At a node of
            a federation, names of files and folders stay in the node's own log.
    """

    def __init__(self, line: str, *, public: str | None = None) -> None:
        """Keep it one line, whatever the value holds."""
        super().__init__(_join(line))
        self.public = None if public is None else _join(public)


class SettingError(UserError):
    """A setting of the run is wrong; the line speaks of nothing else and may leave the machine."""

    def __init__(self, line: str) -> None:
        """Make the whole line public."""
        super().__init__(line, public=line)


def _join(text: str) -> str:
    return printable(" ".join(text.splitlines()).strip())


def printable(text: str) -> str:
    """Write what no terminal should get, and what is no text, as in Python's literals."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def name_some(names: Sequence[str]) -> str:
    """Join the first names for a message and say how many more there are."""
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(map(printable, names[:MAX_NAMES])) + more
