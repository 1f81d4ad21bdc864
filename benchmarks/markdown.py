"""Tables of Markdown."""

import re
from typing import Any


def line(*cells: Any) -> str:
    """Join cells to a line of a table."""
    return re.sub(" +", " ", f"| {' | '.join(map(str, cells))} |")


def head(*names: str) -> list[str]:
    """Make the first two lines of a table."""
    return [line(*names), "|" + "---|" * len(names)]
