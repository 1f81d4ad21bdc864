"""The app's bundle: what tells a site's own from another one."""

import hashlib
import tomllib
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile

from flwr.cli.build import build_fab_from_disk

from fedssl.errors import UserError

LIST = ".info/CONTENT"  # Flower's list of the other files; the rest says it already
MAX_BYTES = 64 * 2**20  # of the unpacked files; ours has half a megabyte


class BadBundle(Exception):
    """The bytes are no bundle that could be unpacked in one way only."""


def build(project: Path) -> bytes:
    """Build a project's bundle, as `flwr run` does.

    Raises:
        UserError: there is no Flower app in that folder.
    """
    try:
        return build_fab_from_disk(project)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{project}: no Flower app can be bundled from it ({error}); change to the project's "
            "directory"
        ) from error


def own_digest(project: Path) -> str:
    """Compute the digest of the bundle that `flwr run` would build of a project.

    Raises:
        UserError: there is no Flower app in that folder.
    """
    return digest_of(build(project))


def digest_of(fab: bytes) -> str:
    """Compute the SHA-256 (hex) over the sorted names and contents of a bundle's files.

    The bytes of the archive themselves depend on the version of zlib.

    Raises:
        BadBundle: not a zip archive, too large, or with two files of one name.
    """
    total = hashlib.sha256()
    for name, content in sorted(_files_of(fab).items()):
        total.update(f"{hashlib.sha256(content).hexdigest()} {len(name)} {name}\n".encode())
    return total.hexdigest()


def names_of(fab: bytes) -> tuple[str, str]:
    """Give a bundle's name, as in publisher/project, and version, as Flower reads them.

    Raises:
        BadBundle: it does not say.
    """
    try:
        about = tomllib.loads(_files_of(fab)["pyproject.toml"].decode())
        publisher = about["tool"]["flwr"]["app"]["publisher"]
        return f"{publisher}/{about['project']['name']}", str(about["project"]["version"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadBundle(f"its pyproject.toml names no app ({error!r})") from error


def _files_of(fab: bytes) -> dict[str, bytes]:
    try:
        with ZipFile(BytesIO(fab)) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            if len(names) != len(set(names)):
                raise BadBundle("two of its files have one name")
            if sum(entry.file_size for entry in entries) > MAX_BYTES:
                raise BadBundle(f"its files are larger than {MAX_BYTES} bytes")
            return {name: archive.read(name) for name in names if name != LIST}
    except BadBundle:
        raise
    except Exception as error:  # whatever hostile bytes make of zipfile
        raise BadBundle(f"it is no zip archive ({error})") from error
