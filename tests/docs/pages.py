"""The pages: their text, their commands, their headings."""

import re
import shlex
from pathlib import Path

from conftest import ROOT

FENCE = re.DOTALL | re.MULTILINE
README = (ROOT / "README.md").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def read(name):
    """Read a page by its path; on one line, for searching."""
    return " ".join((ROOT / name).read_text().split())


def blocks(text, *languages):
    """List the blocks of code in some languages."""
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", text, FENCE)


def commands(name):
    """List the commands of a page: lines of its shell blocks, and in its sentences."""
    text = (ROOT / name).read_text()
    lines = "".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```", "", text, flags=FENCE)
    quoted = (" ".join(words.split()) for words in re.findall(r"`([^`]+)`", prose))
    lines += [words for words in quoted if words.startswith(("python ", "flower-", "flwr "))]
    split = (shlex.split(line, comments=True) for line in lines)
    return [words for words in split if words]


def anchors(page):
    """Name the headings of a page as GitHub does in addresses."""
    text = re.sub(r"^```.*?^```", "", Path(page).read_text(), flags=FENCE)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
