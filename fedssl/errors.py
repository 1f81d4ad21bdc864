"""The one exception that ends a program with a line instead of a traceback, and what warns."""

WARNING = "warning: "  # begins the reported lines that --quiet leaves


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
    return " ".join(text.splitlines()).strip()
