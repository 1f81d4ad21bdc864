"""What a stream can show: a person's terminal, or plain text for files and pipes."""

import os
from typing import TextIO

STYLES = {"strong": "1", "error": "31", "warning": "33"}  # of SGR, ECMA-48


def is_live(stream: TextIO) -> bool:
    """Tell whether the stream is a terminal where a line can be rewritten."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def paint(text: str, style: str, stream: TextIO) -> str:
    """Style a text for a terminal, unless NO_COLOR is set (https://no-color.org)."""
    if not is_live(stream) or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{STYLES[style]}m{text}\x1b[0m"
