"""Writing files so that a reader finds the old content or the new, never a part of it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from fedssl.errors import UserError

PARTIAL = ".partial-"


def write_atomically(file: Path, data: bytes) -> None:
    """Write a file under a temporary name, sync it, and rename it into place.

    Raises:
        OSError: it can't be written; the file is what it was before.
    """
    with replacing(file) as temporary:
        temporary.write_bytes(data)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Give the temporary name under which a file is written; then sync and rename it.

    Raises:
        OSError: it can't be written; the file is what it was before.
    """
    temporary = file.with_name(f"{PARTIAL}{uuid4().hex[:8]}-{file.name}")
    try:
        yield temporary
        with temporary.open("r+b") as written:
            os.fsync(written.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(file.parent)


@contextmanager
def writing_to(place: Path) -> Iterator[None]:
    """Say in a line where something can't be written.

    Raises:
        RuntimeError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise RuntimeError(f"can't write to {place}: {error.strerror or error}") from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut, where the system can."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_partial(folder: Path) -> list[str]:
    """Remove what a killed process was writing; return the names it would have had."""
    names = []
    for file in sorted(folder.glob(f"{PARTIAL}*")):
        names.append(file.name.removeprefix(PARTIAL).partition("-")[2])
        file.unlink()
    return names


def check_replaceable(key: str, given: str) -> Path:
    """Make sure that a file can be written where `key` says, leaving nothing behind.

    Raises:
        UserError: it is a folder, or the folder is not there or can't be written.
    """
    file = Path(given).expanduser()
    if file.is_dir():
        raise UserError(f"{key}={given}: is a folder; give the name of a file")
    if not file.parent.is_dir():
        raise UserError(f"{key}={given}: there is no folder {file.parent}; make it first")
    probe = file.with_name(f"{PARTIAL}{uuid4().hex[:8]}-{file.name}")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{key}={given}: can't be written ({error.strerror}); choose another place"
        ) from error
    return file


def check_writable(directory: Path) -> None:
    """Make sure that a run's directory can be made, leaving nothing behind.

    Raises:
        UserError: it can't be made or written.
    """
    existing = directory.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        probe = existing / f".writable-{os.getpid()}"
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise UserError(
            f"output_dir={directory}: can't be written ({error.strerror}: {existing}); "
            "choose another with output_dir=DIR"
        ) from error
