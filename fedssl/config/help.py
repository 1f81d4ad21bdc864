"""Answers to a command line that only asks: for help, the configuration, a completion.

The programs call this before they import torch and Flower, which takes seconds.
"""

import io
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from textwrap import fill

from fedssl.config.command_line import (
    HYDRA_OPTIONS,
    HYDRA_SWITCHES,
    SWITCHES,
    flags_to_overrides,
    is_informative,
    run_entry,
)
from fedssl.errors import UserError

COLUMNS = 80


def answer(name: str) -> None:
    """Answer what the command line asks about conf/NAME.yaml, and end; return if it wants work."""
    arguments = sys.argv[1:]
    if not is_informative(arguments):
        return
    if "query=bash" in arguments:
        print(" ".join(_complete(name, os.environ["COMP_LINE"])))
    elif {"--help", "-h"} & set(arguments):
        for line in _ask_hydra(name).strip().splitlines():
            print(fill(line, COLUMNS, subsequent_indent="    ", break_on_hyphens=False))
    else:
        _run_hydra(name)
    sys.exit()


def _run_hydra(name: str) -> None:
    def nothing(config: object) -> None:
        """There is no job where Hydra only answers."""

    nothing.__module__ = Path(sys.argv[0]).stem  # what Hydra calls the job
    run_entry(name, check=nothing, job=nothing)


def _ask_hydra(name: str) -> str:
    """Catch what Hydra prints."""
    text = io.StringIO()
    with redirect_stdout(text):
        try:
            _run_hydra(name)
        except SystemExit as end:
            if end.code:
                raise
    return text.getvalue()


def _complete(name: str, line: str) -> list[str]:
    """Complete the last word of a command line; Hydra itself knows no `--key=value`."""
    *earlier, word = line.split(" ")
    flags = HYDRA_SWITCHES | HYDRA_OPTIONS | SWITCHES
    if earlier[-1].startswith("--") and "=" not in earlier[-1] and earlier[-1] not in flags:
        key = f"{earlier.pop()}="
        return [
            match.removeprefix(key) for match in _complete(name, " ".join([*earlier, key + word]))
        ]
    own = sorted(flag for flag in flags if word.startswith("-") and flag.startswith(word))
    try:
        given = [a for a in flags_to_overrides(earlier) if "=" in a and not a.startswith("-")]
        os.environ["COMP_LINE"] = " ".join(["program", *given, word.removeprefix("--")])
        with redirect_stderr(io.StringIO()):  # nothing may disturb a line that is being typed
            found = _ask_hydra(name).split()
    except (UserError, SystemExit):
        return own
    return own + [f"--{match}" if word.startswith("--") else match for match in found]
