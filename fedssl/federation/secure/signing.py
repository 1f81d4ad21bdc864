"""Signatures of the nodes under the keys of a round, so that no server slips its own in."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    load_pem_private_key,
    load_pem_public_key,
    load_ssh_private_key,
)

from fedssl.config.roster import read_roster
from fedssl.errors import UserError

METHOD = ec.ECDSA(SHA256())


def sign(file: Path, text: bytes) -> bytes:
    """Sign a text by a node's private key, the one that Flower's authentication uses.

    Raises:
        UserError: no such file, or no such key in it.
    """
    try:
        data = file.read_bytes()
        opened: Any = (
            load_ssh_private_key(data, None)
            if b"OPENSSH" in data
            else load_pem_private_key(data, None)
        )
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UserError(
            f"signing-key={file}: no private key that can be read ({error}); give the node's own",
            public="its signing-key can't be read",
        ) from error
    if not isinstance(opened, ec.EllipticCurvePrivateKey):
        raise UserError(
            f"signing-key={file}: no key on an elliptic curve, as nodes have",
            public="its signing-key can't be used",
        )
    return opened.sign(text, METHOD)


def check_signatures(
    nodes_file: Path, told: Mapping[int, tuple[bytes, bytes]], threshold: int
) -> None:
    """Make sure that the keys of all partitions are signed by the nodes of a roster.

    Args:
        told: text and signature, by partition.
        threshold: nodes that it takes to open a secret, more than half of the roster: else a
            server could make up a round of one node and a few that help it.

    Raises:
        UserError: the roster can't be read.
        ValueError: a partition is not in the roster, its signature is another's or missing, or
            the threshold is too low.
    """
    members = {member.partition: member for member in read_roster(nodes_file)}
    if threshold <= len(members) / 2:
        raise ValueError(
            f"a threshold of {threshold} is not above half of the {len(members)} nodes of "
            "nodes-file"
        )
    for partition, (text, signature) in told.items():
        if partition not in members:
            raise ValueError(f"partition {partition} is not in nodes-file")
        key: Any = load_pem_public_key(members[partition].flower_key)
        try:
            key.verify(signature, text, METHOD)
        except (InvalidSignature, AttributeError, TypeError) as error:
            raise ValueError(
                f"the keys of partition {partition} are not signed by its node"
            ) from error
