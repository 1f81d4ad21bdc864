"""Answers to a command line that only asks, for help, the configuration, a completion, or is wrong.

The programs call this before they import torch and Flower, which takes seconds.
"""

import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from textwrap import fill
from typing import Any

from hydra import compose, initialize_config_dir

from fedssl.config.checks import describe
from fedssl.config.command_line import (
    HYDRA_OPTIONS,
    HYDRA_SWITCHES,
    SWITCHES,
    Complete,
    flags_to_overrides,
    is_informative,
    jobs_of,
    one_line,
    read_arguments,
    run_entry,
)
from fedssl.config.compose import CONF, evaluation_overrides, flatten, load_config, to_mapping
from fedssl.config.moved import modernize_overrides
from fedssl.config.schema import GROUPS, PROGRAMS
from fedssl.errors import UserError

COLUMNS = 80
HELP_COLUMN = 34
INNER = ("_target_", "acts_on")  # keys of conf/ that nobody sets on a command line

OPENINGS = {
    "config": """\
Federated SimCLR: clients train on images without labels, a Flower server
averages the models, a linear head on the frozen encoder tells how good it is.

  python main.py --num_clients=10 --num_rounds=20
  python main.py dataset=cifar10 partition=dirichlet partition.alpha=0.1
  python main.py optimizer=sgd eval=finetune
  python main.py --resume=latest""",
    "test": """\
Evaluation of a trained encoder: how good is the representation?

  python test.py
  python test.py --run=outputs/latest label_fraction=0.02 seeds=5
  python test.py eval=finetune
  python test.py dataset=imagefolder dataset.path=DIR label_fraction=1""",
    "embed": """\
Features of every image of a folder, by a trained encoder, as Parquet.

  python -m scripts.embed photos --out=features.parquet
  python -m scripts.embed photos --neighbours=neighbours.png""",
    "predict": """\
The class of every image of a folder, by the classifier of a run, as CSV.

  python -m scripts.predict photos --out=predictions.csv
  python -m scripts.predict photos --neighbours=neighbours.png""",
    "export": """\
A trained encoder as ONNX, compared with the original.

  python -m scripts.export --out=encoder.onnx run=outputs/latest""",
    "report": """\
One page with the pictures, numbers and settings of a run.

  python -m scripts.report run=outputs/latest
  python -m scripts.report path=DIR""",
}
SYNTAX = """\
--key=value, --key value and key=value mean the same. The values below are those
under the options given, so that `dataset=cifar10 --help` shows that data set's."""
HYDRA = """\
Hydra
  --multirun seed=0,1,2           several jobs, one after another
  --cfg job                       every value, as YAML
  -sc install=bash                a script for bash that completes all this
  --hydra-help                    more"""


def answer(name: str, complete: Complete | None = None) -> None:
    """Answer what the command line asks about conf/NAME.yaml, and end; return if it wants work.

    Args:
        complete: as of `read_arguments`; with it, wrong settings end the program here.
    """
    arguments = sys.argv[1:]
    if not is_informative(arguments):
        if complete is not None:
            with one_line():
                _check(name, arguments, complete)
        return
    if "query=bash" in arguments:
        print(" ".join(_complete(name, os.environ["COMP_LINE"])))
    elif {"--help", "-h"} & set(arguments):
        with one_line():
            given = read_arguments(name, arguments)
            print(help_text(name, [a for a in given if "=" in a and not a.startswith("-")]))
    else:
        _run_hydra(name)
    sys.exit()


def _check(name: str, arguments: Sequence[str], complete: Complete) -> None:
    """Check all settings; those that go on from a run's own are checked once that is read.

    Raises:
        UserError: the first that is wrong.
    """
    given, _ = modernize_overrides(flags_to_overrides(arguments))
    if any(override.startswith("resume=") for override in given):
        return
    for job in jobs_of(complete(given)):
        load_config(name, job)


def help_text(name: str, overrides: Sequence[str]) -> str:
    """Explain a program: its groups with their options, and its keys with value and meaning.

    Raises:
        UserError: an override that is wrong.
    """
    config = load_config(name, overrides)
    values = flatten(config)
    parts = [OPENINGS[name], SYNTAX]
    groups = list(_list_groups(name, overrides))
    if groups:
        parts.append("\n".join(["Groups and their options, as in group=option", *groups]))
    sections: dict[str, list[str]] = {}
    for key, text in describe(name, to_mapping(config)).items():
        section = key.rpartition(".")[0]
        if key.rpartition(".")[2] not in INNER:
            text += "; null: as in the run" * (key in PROGRAMS[name].open)
            sections.setdefault(section, []).append(_entry(f"{key}={show(values[key])}", text))
    parts += ["\n".join([_heading(name, key), *lines]) for key, lines in sections.items()]
    return "\n\n".join([*parts, HYDRA])


def show(value: Any) -> str:
    """Write a value as on a command line."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"[{','.join(map(show, value))}]" if isinstance(value, list) else str(value)


def _heading(name: str, section: str) -> str:
    if section in GROUPS:
        return f"{section}: {GROUPS[section].help}"
    return {"": "Settings", "monitor": "monitor: kNN accuracy after every round"}.get(
        section, section
    )


def _entry(first: str, text: str) -> str:
    """Put a text beside what it explains, or below if that is long."""
    indent = " " * HELP_COLUMN
    lines = fill(text, COLUMNS, initial_indent=indent, subsequent_indent=indent)
    fits = len(first) + 4 <= HELP_COLUMN
    return f"  {first}".ljust(HELP_COLUMN) + lines[HELP_COLUMN:] if fits else f"  {first}\n{lines}"


def _list_groups(name: str, overrides: Sequence[str]) -> Iterator[str]:
    """List the groups of a program with their options, and the one that is in use."""
    given = evaluation_overrides(overrides) if name == "test" else list(overrides)
    with initialize_config_dir(str(CONF), version_base=None):
        hydra = compose(name, given, return_hydra_config=True).hydra
    used: Mapping[str, str | None] = hydra.runtime.choices
    plan = PROGRAMS[name]
    groups = [*plan.groups, *filter(None, (plan.at_top, plan.optional))]
    for group in [*groups, *(["experiment"] if name == "config" else [])]:
        options = sorted(file.stem for file in (CONF / group).glob("*.yaml"))
        if options:
            chosen = used.get(group) or used.get(f"{group}@_global_")
            text = f"{', '.join(options)} [{chosen}]" if chosen else ", ".join(options)
            yield _entry(group, text)


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
    found = [match for match in found if not match.startswith("schema")]  # where defaults are kept
    return own + [f"--{match}" if word.startswith("--") else match for match in found]
