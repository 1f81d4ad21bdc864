"""A private certificate authority, the SuperLink's certificate, and keys of nodes."""

import ipaddress
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedssl.errors import UserError

ALWAYS = ["localhost", "127.0.0.1", "::1"]  # the SuperLink's own processes connect here
CURVE = ec.SECP384R1  # what Flower's node authentication expects
PEM = serialization.Encoding.PEM


def make_certificates(folder: Path, hosts: Sequence[str], nodes: int, days: int) -> list[Path]:
    """Write what is missing of the authority, the certificate and the node keys.

    Args:
        hosts: names and addresses under which nodes reach the SuperLink.
        days: how long the certificates are valid.

    Returns:
        The files that were made.

    Raises:
        UserError: a name that can't be one, or a certificate for other names.
    """
    names = list(dict.fromkeys([*hosts, *ALWAYS]))
    alternatives = [_general_name(name) for name in names]
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        made = _make_authority(folder, days)
        made += _make_server(folder, alternatives, days)
        for number in range(1, nodes + 1):
            made += _make_node(folder / f"node{number}")
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
    authority = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    authority_key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    if not isinstance(authority_key, ec.EllipticCurvePrivateKey):
        raise UserError(f"--out={folder}: ca.key is not of an elliptic curve; choose another")
    key = ec.generate_private_key(CURVE())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "SuperLink")])
    signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    signed = (
        _builder(subject, authority.subject, key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(signer, critical=False)
        .sign(authority_key, hashes.SHA384())
    )
    _write_private(key_file, key, serialization.PrivateFormat.PKCS8, PEM)
    file.write_bytes(signed.public_bytes(PEM))
    return [file, key_file]


def _make_node(key_file: Path) -> list[Path]:
    public = key_file.with_suffix(".pub")
    if key_file.exists() and public.exists():
        return []
    key = ec.generate_private_key(CURVE())
    _write_private(key_file, key, serialization.PrivateFormat.OpenSSH, PEM)
    openssh = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    public.write_bytes(key.public_key().public_bytes(*openssh) + b"\n")
    return [key_file, public]


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
) -> None:
    """Write a private key that only its owner may read, replacing none."""
    data = key.private_bytes(encoding, form, serialization.NoEncryption())
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
        out.write(data)
