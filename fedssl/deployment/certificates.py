"""A private certificate authority, the certificates it signs, and the keys of nodes.

    ca.crt, ca.key           the authority
    server.crt, server.key   for the SuperLink on this machine and the door outside
    NAME, NAME.pub           a node's key pair for Flower's own authentication (OpenSSH)
    NAME.pem                 its TLS client certificate with another private key; NAME.crt:
                             the certificate alone, which stays when NAME.pem has left
    nodes.yaml               which node holds which partition
    nginx.conf               the door (see `fedssl.deployment.door`)

A site needs ca.crt, NAME and NAME.pem.
"""

import ipaddress
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedssl.deployment.members import check_node_name, update_roster
from fedssl.errors import UserError

ALWAYS = ["localhost", "127.0.0.1", "::1"]  # the SuperLink's own processes connect here
CURVE = ec.SECP384R1  # what Flower's node authentication expects
PEM = serialization.Encoding.PEM


def make_certificates(
    folder: Path, hosts: Sequence[str], nodes: Sequence[str], days: int
) -> list[Path]:
    """Write what is missing of the authority, the certificates and the node keys; then the roster.

    Args:
        hosts: names and addresses under which nodes reach the server.
        nodes: names of the nodes to add.
        days: how long the certificates are valid.

    Returns:
        The files that were made.

    Raises:
        UserError: a name that can't be one, or a certificate for other names.
    """
    names = list(dict.fromkeys([*hosts, *ALWAYS]))
    alternatives = [_general_name(name) for name in names]
    for name in nodes:
        check_node_name(name)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        made = _make_authority(folder, days)
        made += _make_server(folder, alternatives if hosts else [], days)
        for name in nodes:
            made += _make_node(folder, name) + _make_client(folder, name, days)
        update_roster(folder)
    except OSError as error:
        raise UserError(f"--out={folder}: can't be written ({error.strerror})") from error
    return made


def _make_authority(folder: Path, days: int) -> list[Path]:
    certificate, key_file = folder / "ca.crt", folder / "ca.key"
    if certificate.exists() and key_file.exists():
        return []
    if certificate.exists() or key_file.exists():
        raise UserError(f"--out={folder}: holds only one of ca.crt and ca.key; choose another")
    key = ec.generate_private_key(CURVE())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Federated SimCLR authority")])
    usage = x509.KeyUsage(
        **dict.fromkeys(("key_cert_sign", "crl_sign", "digital_signature"), True),
        **dict.fromkeys(("content_commitment", "key_encipherment", "data_encipherment"), False),
        **dict.fromkeys(("key_agreement", "encipher_only", "decipher_only"), False),
    )
    signed = (
        _builder(name, name, key, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    _write_private(key_file, key, serialization.PrivateFormat.PKCS8, PEM)
    certificate.write_bytes(signed.public_bytes(PEM))
    return [certificate, key_file]


def _make_server(folder: Path, names: list[x509.GeneralName], days: int) -> list[Path]:
    file, key_file = folder / "server.crt", folder / "server.key"
    if file.exists() and key_file.exists():
        present = x509.load_pem_x509_certificate(file.read_bytes())
        known = present.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        missing = [name for name in names if name not in known]
        if missing:
            raise UserError(
                f"--hosts: {missing[0].value}: {file} was made without it; delete {file.name} and "
                f"{key_file.name} to make them again"
            )
        return []
    key = ec.generate_private_key(CURVE())
    everyone = names or [_general_name(name) for name in ALWAYS]
    signed = _sign(folder, "SuperLink", key, ExtendedKeyUsageOID.SERVER_AUTH, days, everyone)
    _write_private(key_file, key, serialization.PrivateFormat.PKCS8, PEM)
    file.write_bytes(signed.public_bytes(PEM))
    return [file, key_file]


def _make_node(folder: Path, name: str) -> list[Path]:
    key_file, public = folder / name, folder / f"{name}.pub"
    if public.exists():  # a site may have made its own, and sent only that
        return []
    key = ec.generate_private_key(CURVE())
    _write_private(key_file, key, serialization.PrivateFormat.OpenSSH, PEM)
    openssh = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    public.write_bytes(key.public_key().public_bytes(*openssh) + b"\n")
    return [key_file, public]


def _make_client(folder: Path, name: str, days: int) -> list[Path]:
    file, public = folder / f"{name}.pem", folder / f"{name}.crt"
    if public.exists():
        return []
    key = ec.generate_private_key(CURVE())
    signed = _sign(folder, name, key, ExtendedKeyUsageOID.CLIENT_AUTH, days)
    file.unlink(missing_ok=True)
    _write_private(file, key, serialization.PrivateFormat.PKCS8, PEM, signed.public_bytes(PEM))
    public.write_bytes(signed.public_bytes(PEM))
    return [file, public]


def _sign(
    folder: Path,
    name: str,
    key: ec.EllipticCurvePrivateKey,
    usage: x509.ObjectIdentifier,
    days: int,
    alternatives: Sequence[x509.GeneralName] = (),
) -> x509.Certificate:
    authority = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    authority_key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    if not isinstance(authority_key, ec.EllipticCurvePrivateKey):
        raise UserError(f"--out={folder}: ca.key is not of an elliptic curve; choose another")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    builder = (
        _builder(subject, authority.subject, key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(signer, critical=False)
    )
    if alternatives:
        names = x509.SubjectAlternativeName(alternatives)
        builder = builder.add_extension(names, critical=False)
    return builder.sign(authority_key, hashes.SHA384())


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # clocks differ
        .not_valid_after(now + timedelta(days=days))
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        ascii_name = name.encode("idna").decode()
    except UnicodeError as error:
        raise UserError(f"--hosts: {name!r}: neither a name nor an address") from error
    if not ascii_name or any(c in ascii_name for c in "/:@ "):
        raise UserError(f"--hosts: {name!r}: neither a name nor an address; leave ports out")
    return x509.DNSName(ascii_name)


def _write_private(
    file: Path,
    key: ec.EllipticCurvePrivateKey,
    form: serialization.PrivateFormat,
    encoding: serialization.Encoding,
    before: bytes = b"",
) -> None:
    """Write a private key that only its owner may read, replacing none."""
    data = before + key.private_bytes(encoding, form, serialization.NoEncryption())
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
        out.write(data)
