"""The nodes of a federation, by the files that lie beside the authority's certificate."""

import re
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509

from fedssl.config.roster import Member, read_roster, write_roster
from fedssl.errors import UserError

SUFFIXES = ("", ".pub", ".pem", ".crt")
RESERVED = ("ca", "server", "door", "nginx.conf", "nodes.yaml", "superlink.db")


def remove_nodes(folder: Path, nodes: Sequence[str]) -> None:
    """Delete the files of nodes, and write the roster without them.

    Raises:
        UserError: there is no such node.
    """
    nodes = list(dict.fromkeys(nodes))
    for name in nodes:
        check_node_name(name)
        if not (folder / f"{name}.pub").exists():
            raise UserError(f"--remove: {name}: no such node; known: {_known(folder)}")
    if len(nodes) == len(list(node_files(folder))):
        raise UserError("--remove: a federation needs at least one node; leave one in")
    for name in nodes:
        for suffix in SUFFIXES:
            (folder / f"{name}{suffix}").unlink(missing_ok=True)
    update_roster(folder)


def update_roster(folder: Path) -> tuple[Member, ...]:
    """Write nodes.yaml for the public keys that are there.

    A node that stands there keeps its name and partition; a new one gets the first free
    partition.
    """
    file = folder / "nodes.yaml"
    keys = {name: (folder / f"{name}.pub").read_text().strip() for name in node_files(folder)}
    named = {_key_of(name, key): name for name, key in keys.items()}
    present = read_roster(file) if file.exists() else ()
    members = [member for member in present if member.flower_key in named]
    known, taken = {m.flower_key for m in members}, {m.partition for m in members}
    for key, name in named.items():
        if key not in known:
            partition = next(n for n in range(len(named) + len(taken)) if n not in taken)
            taken.add(partition)
            members.append(Member(partition, name, keys[name]))
    members.sort(key=lambda member: member.partition)
    if members:
        write_roster(file, members)
    return tuple(members)


def node_files(folder: Path) -> list[str]:
    """List the nodes by the names of their files, node2 before node10."""
    names = [file.name.removesuffix(".pub") for file in folder.glob("*.pub")]
    return sorted(names, key=lambda name: [int(t) if t.isdigit() else t for t in _split(name)])


def client_certificates(folder: Path) -> dict[bytes, x509.Certificate]:
    """Read the nodes' client certificates, by the node's public key as Flower sends it."""
    found = {}
    for name in node_files(folder):
        file = folder / f"{name}.crt"
        if file.exists():
            key = _key_of(name, (folder / f"{name}.pub").read_text())
            found[key] = x509.load_pem_x509_certificate(file.read_bytes())
    return found


def _split(name: str) -> list[str]:
    return re.split(r"(\d+)", name)


def _key_of(name: str, public_key: str) -> bytes:
    try:
        return Member(0, name, public_key.strip()).flower_key
    except ValueError as error:
        raise UserError(f"{name}.pub: no OpenSSH public key ({error})") from error


def _known(folder: Path) -> str:
    return ", ".join(node_files(folder)) or "none"


def check_node_name(name: str) -> None:
    """Make sure that a node's files can have this name.

    Raises:
        UserError: they can't.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise UserError(
            f"--names: {name!r}: must be at most 64 letters, digits, hyphens, dots and underscores"
        )
    if name in RESERVED or name.endswith((".pub", ".pem", ".crt", ".key")):
        raise UserError(f"--names: {name}: is the name of another file; choose another")
