"""Which node holds which partition: a file of names, partitions and public keys.

    - partition: 0
      name: hospital-a
      public_key: ecdsa-sha2-nistp384 AAAA...

`python -m scripts.certificates` writes it as nodes.yaml; the SuperLink's keys and the
run's partitions are read from it.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_public_key,
)

from fedssl.errors import UserError


@dataclass(frozen=True)
class Member:
    """A node that belongs to a federation.

    Attributes:
        public_key: one line, as in an OpenSSH .pub file.
    """

    partition: int
    name: str
    public_key: str

    @property
    def flower_key(self) -> bytes:
        """The key in the form in which Flower keeps it: PEM.

        Raises:
            ValueError: it is no public key.
        """
        try:
            key = load_ssh_public_key(self.public_key.encode())
        except UnsupportedAlgorithm as error:
            raise ValueError(str(error)) from error
        return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def read_roster(file: Path) -> tuple[Member, ...]:
    """Read the members of a federation, by partition.

    Raises:
        UserError: no such file, something else in it, or two members with the same
            partition, name or key.
    """
    try:
        entries = yaml.safe_load(file.read_text())
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: no YAML ({error})") from error
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{file}: must be a list of nodes with partition, name and public_key")
    members = sorted(
        (_member(file, number, entry) for number, entry in enumerate(entries, start=1)),
        key=lambda member: member.partition,
    )
    for key in ("partition", "name", "flower_key"):
        value, count = Counter(getattr(member, key) for member in members).most_common(1)[0]
        if count > 1:
            twice = "public_key" if key == "flower_key" else f"{key}={value}"
            raise UserError(f"{file}: {twice} stands there {count} times; give each node its own")
    return tuple(members)


def write_roster(file: Path, members: Iterable[Member]) -> None:
    """Write the members of a federation."""
    text = yaml.safe_dump([asdict(member) for member in members], sort_keys=False, width=1000)
    file.write_text(text)


def _member(file: Path, number: int, entry: Any) -> Member:
    keys = {"partition", "name", "public_key"}
    if not isinstance(entry, dict) or entry.keys() != keys:
        raise UserError(f"{file}: node {number}: must have partition, name and public_key alone")
    partition, name = entry["partition"], entry["name"]
    if type(partition) is not int or partition < 0:
        raise UserError(
            f"{file}: node {number}: partition={partition}: must be a whole number, at least 0"
        )
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{file}: node {number}: name={name}: must be text")
    member = Member(partition, name.strip(), str(entry["public_key"]).strip())
    try:
        member.flower_key  # noqa: B018
    except ValueError as error:
        raise UserError(
            f"{file}: node {number}: public_key: no OpenSSH public key ({error})"
        ) from error
    return member
