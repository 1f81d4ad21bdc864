"""The one exception that ends a program with a line instead of a traceback, and what warns."""

WARNING = "warning: "  # begins the reported lines that --quiet leaves


class UserError(Exception):
    """Something the user gave is wrong: one line with the value and the remedy."""

    def __init__(self, line: str) -> None:
        """Keep it one line, whatever the value holds."""
        super().__init__(" ".join(line.splitlines()).strip())
