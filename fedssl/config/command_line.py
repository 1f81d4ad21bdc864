"""From the command line to overrides, and programs that end with one line."""

import functools
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise, product
from threading import Timer

import hydra
from omegaconf import DictConfig

from fedssl.config.compose import (
    CONF,
    evaluation_overrides,
    load_config,
    parse_overrides,
    quote_texts,
    take_paths_as_text,
)
from fedssl.config.moved import modernize_overrides
from fedssl.errors import UserError
from fedssl.terminal import print_line

INTERRUPT_GRACE_S = 15.0
Complete = Callable[[Sequence[str]], list[str]]  # adds overrides that the given ones imply

# Hydra's own command line, https://hydra.cc/docs/advanced/hydra-command-line-flags, but for
# --run: to run is what happens anyway, and `--run DIR` is the run to evaluate
HYDRA_SWITCHES = {
    *("--help", "-h", "--hydra-help", "--version", "--resolve", "-r"),
    *("--multirun", "-m", "--shell-completion", "-sc"),
}
HYDRA_OPTIONS = {
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"),
    *("--config-dir", "-cd", "--experimental-rerun", "--info", "-i"),
}
SWITCHES = {"--quiet"}  # ours that need no value
INFORMATIVE = {"--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i"} | {
    *("--shell-completion", "-sc"),
}


def flags_to_overrides(arguments: Sequence[str]) -> list[str]:
    """Turn `--key=value` and `--key value` into Hydra overrides; keep Hydra's own flags.

    Raises:
        UserError: a flag without a value, or one that nobody knows.
    """
    result: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, has_value, value = argument.partition("=")
        if argument in HYDRA_SWITCHES:
            result.append(argument)
        elif name in HYDRA_OPTIONS:
            result += [argument] if has_value or not rest else [argument, rest.pop(0)]
        elif argument.startswith("--"):
            if not has_value:
                value = _value_of(argument, rest)
            result.append(f"{name[2:].replace('-', '_')}={value}")
        elif argument.startswith("-"):
            raise UserError(f"{argument}: no such flag; see --help for the known ones")
        else:
            result.append(argument)
    return result


def _value_of(flag: str, rest: list[str]) -> str:
    """Take a flag's value from the arguments behind it."""
    if flag in SWITCHES and (not rest or rest[0] not in ("true", "false")):
        return "true"
    if not rest or rest[0].startswith("--"):
        raise UserError(f"{flag} needs a value, as in {flag}=5")
    return rest.pop(0)


def is_informative(arguments: Iterable[str]) -> bool:
    """Tell whether Hydra shall only print something, such as its help."""
    return any(argument.partition("=")[0] in INFORMATIVE for argument in arguments)


def jobs_of(arguments: Sequence[str]) -> list[list[str]]:
    """List the overrides of every job that the arguments ask for, one without --multirun."""
    free = [a for before, a in pairwise(["", *arguments]) if before not in HYDRA_OPTIONS]
    overrides = [argument for argument in free if not argument.startswith("-")]
    if not {"--multirun", "-m"} & set(arguments):
        return [overrides]
    choices: list[list[str]] = [
        [f"{item.get_key_element()}={value}" for value in item.sweep_string_iterator()]
        if item.is_sweep_override()
        else [str(item.input_line)]
        for item in parse_overrides(overrides)
    ]
    return [list(job) for job in product(*choices)]


def read_arguments(name: str, arguments: Sequence[str], complete: Complete = list) -> list[str]:
    """Turn a command line into what Hydra understands; say which settings have moved.

    Args:
        name: of the configuration below conf/.
        complete: adds overrides that the given ones imply.

    Raises:
        UserError: a flag without a value, or what `complete` raises.
    """
    overrides, notices = modernize_overrides(flags_to_overrides(arguments))
    if "quiet=true" not in overrides:
        for notice in notices:
            print(notice, file=sys.stderr)
    return complete(quote_texts(overrides))


def run_entry(
    name: str,
    check: Callable[[DictConfig], object],
    job: Callable[[DictConfig], None],
    complete: Complete = list,
) -> None:
    """Run a program: flags to overrides, every check of every job, then Hydra and the job.

    Of settings under an old name a line says where they are now.

    Args:
        name: of the configuration below conf/.
        check: raises UserError before any work starts.
        job: does the work; a UserError or RuntimeError ends it with one line.
        complete: adds overrides that the given ones imply.

    Exits with status 2 for what the user gave, 1 for what failed while running,
    130 when interrupted, 143 when terminated.
    """

    @functools.wraps(job)
    def guarded(config: DictConfig) -> None:
        with one_line():
            job(take_paths_as_text(config))

    earlier = {number: signal.signal(number, _interrupt) for number in INTERRUPTIONS}
    try:
        with one_line():
            arguments = read_arguments(name, sys.argv[1:], complete)
            if is_informative(arguments):
                given = [a for a in arguments if "=" in a and not a.startswith("-")]
                load_config(name, [] if {"-sc", "--shell-completion"} & set(arguments) else given)
            else:
                for overrides in jobs_of(arguments):
                    check(load_config(name, overrides))
            sys.argv[1:] = evaluation_overrides(arguments) if name == "test" else arguments
        hydra.main(version_base=None, config_path=str(CONF), config_name=name)(guarded)()
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


class Terminated(KeyboardInterrupt):
    """What SIGTERM raises."""


INTERRUPTIONS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


def _interrupt(number: int, frame: object) -> None:
    """Interrupt the work, and end it by force if it does not give way."""
    interruption = INTERRUPTIONS[signal.Signals(number)]()
    forced = Timer(INTERRUPT_GRACE_S, _leave, [interruption])
    forced.daemon = True
    forced.start()
    raise interruption


def _leave(interruption: KeyboardInterrupt) -> None:
    """End at once, without waiting for threads that wait for others."""
    terminated = isinstance(interruption, Terminated)
    words = ["terminated" if terminated else "interrupted", str(interruption)]
    print(": ".join(filter(None, words)), file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(128 + (signal.SIGTERM if terminated else signal.SIGINT))


@contextmanager
def one_line() -> Iterator[None]:
    """End the program with one line instead of a traceback."""
    try:
        yield
    except UserError as error:
        print_line(f"error: {error}", "error", sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        print_line(f"failed: {error}", "error", sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as error:
        _leave(error)
