"""The terminal, by rich: a console for each stream, and lines in a style."""

import os
import sys
from functools import lru_cache
from typing import TextIO

from rich.console import Console
from rich.text import Text
from rich.theme import Theme

STYLES = Theme({"headline": "bold", "error": "red", "warning": "yellow"})
UNLIMITED = 10_000  # columns of files and pipes: nothing is wrapped there


class _Console(Console):
    def show_cursor(self, show: bool = True) -> bool:
        """Leave the cursor alone: a program that is killed would leave it hidden."""
        return False


def console_on(stream: TextIO) -> Console:
    """Give the console of a stream: always the same, so that lines appear above its moving line.

    Only a terminal gets escape codes, and only one without NO_COLOR (https://no-color.org)
    gets styles. Nothing is wrapped, highlighted or read as markup.
    """
    return _open(getattr(stream, "rich_proxied_file", stream))  # what rich has put in its place


@lru_cache(maxsize=4)
def _open(stream: TextIO) -> Console:
    terminal = stream.isatty()
    return _Console(
        file=stream,
        theme=STYLES,
        force_terminal=terminal,
        force_jupyter=False,
        color_system=None if os.environ.get("NO_COLOR") else "auto",
        width=None if terminal else UNLIMITED,
        soft_wrap=True,
        highlight=False,
        markup=False,
        emoji=False,
    )


def can_rewrite(console: Console) -> bool:
    """Tell whether it is a terminal where a line can be rewritten, and bars can be shown."""
    return console.is_interactive and console.encoding.startswith("utf")


def print_line(line: str, style: str = "", stream: TextIO | None = None) -> None:
    """Print a line as it is, in one of STYLES where the stream shows any.

    Args:
        stream: by default the standard output of this moment.
    """
    console_on(stream or sys.stdout).print(Text(line, style))
