"""Certificates and keys: what they are good for, who may read them, what is kept."""

import http.server
import ssl
import stat
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
from conftest import ROOT
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedssl.config.roster import read_roster, write_roster
from fedssl.deployment.certificates import make_certificates
from fedssl.deployment.members import remove_nodes
from fedssl.deployment.superlink import ConnectionRefused as Refused
from fedssl.deployment.superlink import SuperLinkAddress as Link
from fedssl.errors import UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls") / "certificates"
    make_certificates(
        folder, ["superlink.example.org", "10.0.0.5"], nodes=["node1", "node2"], days=10
    )
    return folder


@pytest.fixture(scope="module")
def encrypted(made):
    """A server on loopback with the made certificate; gives its port."""
    server = http.server.HTTPServer(("0.0.0.0", 0), http.server.SimpleHTTPRequestHandler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made / "server.crt", made / "server.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


@pytest.fixture(scope="module")
def plain():
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


def test_a_client_that_knows_the_authority_connects(made, encrypted):
    Link(f"127.0.0.1:{encrypted}", False, made / "ca.crt").probe()
    Link(f"localhost:{encrypted}", False, made / "ca.crt").probe()


def test_a_client_that_trusts_another_authority_is_refused(encrypted, tmp_path):
    make_certificates(tmp_path, [], nodes=["node1"], days=1)
    for authority in (tmp_path / "ca.crt", None):
        with pytest.raises(Refused, match="certificate is not accepted by"):
            Link(f"127.0.0.1:{encrypted}", False, authority).probe()


def test_a_name_that_is_not_in_the_certificate_is_refused(made, encrypted):
    with pytest.raises(Refused, match="IP address mismatch"):
        Link(f"127.0.0.2:{encrypted}", False, made / "ca.crt").probe()


def test_plain_and_encrypted_connections_do_not_mix(made, encrypted, plain):
    Link(f"127.0.0.1:{plain}", True, None).probe()
    with pytest.raises(Refused, match="does not speak TLS"):
        Link(f"127.0.0.1:{plain}", False, made / "ca.crt").probe()
    with pytest.raises(Refused, match="closes unencrypted connections"):
        Link(f"127.0.0.1:{encrypted}", True, None).probe()


def test_node_keys_are_what_flower_reads(made):
    private = load_ssh_private_key((made / "node1").read_bytes(), None)
    public = load_ssh_public_key((made / "node1.pub").read_bytes())
    assert isinstance(private.curve, ec.SECP384R1)
    assert private.public_key() == public
    assert (made / "node1").read_bytes() != (made / "node2").read_bytes()


def test_a_client_certificate_is_the_node_s_and_has_a_key_of_its_own(made):
    for name in ("node1", "node2"):
        certificate = x509.load_pem_x509_certificate((made / f"{name}.crt").read_bytes())
        assert certificate.subject.rfc4514_string() == f"CN={name}"
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
        assert (made / f"{name}.pem").read_bytes().startswith((made / f"{name}.crt").read_bytes())
        ssl.create_default_context().load_cert_chain(
            made / f"{name}.pem"
        )  # key and certificate fit
        flower = load_ssh_public_key((made / f"{name}.pub").read_bytes())
        assert certificate.public_key() != flower


def test_a_server_takes_a_node_s_certificate_and_no_other(made, tmp_path):
    make_certificates(tmp_path, [], ["node1"], days=1)
    assert shake_hands(made, made / "node1.pem") is None
    assert isinstance(shake_hands(made, tmp_path / "node1.pem"), ssl.SSLCertVerificationError)
    server = tmp_path / "server.pem"
    server.write_bytes((made / "server.crt").read_bytes() + (made / "server.key").read_bytes())
    assert isinstance(shake_hands(made, server), ssl.SSLCertVerificationError)


def shake_hands(folder, certificate):
    """Shake hands with a server that asks for a client's certificate; give the error."""
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=folder / "ca.crt")
    server.load_cert_chain(folder / "server.crt", folder / "server.key")
    server.verify_mode = ssl.CERT_REQUIRED
    client = ssl.create_default_context(cafile=folder / "ca.crt")
    client.load_cert_chain(certificate)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(back, there, server_hostname="localhost"),
        server.wrap_bio(there, back, server_side=True),
    ]
    for _ in range(6):
        for end in ends:
            try:
                end.do_handshake()
                end.read()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                return error
    return None


def test_folder_and_private_keys_are_private(made):
    private = {"ca.key", "server.key", "node1", "node2", "node1.pem", "node2.pem"}
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    for name in private:
        assert stat.S_IMODE((made / name).stat().st_mode) == 0o600
    public = {file for file in made.iterdir() if file.is_file() and file.name not in private}
    assert not any(b"PRIVATE" in file.read_bytes() for file in public)


def test_an_open_folder_is_closed(tmp_path):
    tmp_path.chmod(0o755)
    make_certificates(tmp_path, [], nodes=["node1"], days=1)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


def test_nodes_can_be_added_and_nothing_is_replaced(tmp_path):
    make_certificates(tmp_path, ["a.example.org"], nodes=["node1"], days=1)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    roster = before.pop("nodes.yaml")
    made = make_certificates(tmp_path, ["a.example.org"], nodes=["node1", "node2"], days=1)
    assert [file.name for file in made] == ["node2", "node2.pub", "node2.pem", "node2.crt"]
    assert all((tmp_path / name).read_bytes() == data for name, data in before.items())
    assert (tmp_path / "nodes.yaml").read_bytes().startswith(roster)


def test_private_files_may_leave_the_folder(tmp_path):
    """They belong at the site; the public ones stay, and so does the node."""
    make_certificates(tmp_path, [], nodes=["node1"], days=1)
    before = read_roster(tmp_path / "nodes.yaml")
    for name in ("node1", "node1.pem"):
        (tmp_path / name).unlink()
    assert make_certificates(tmp_path, [], nodes=["node1"], days=1) == []
    assert read_roster(tmp_path / "nodes.yaml") == before


def test_a_site_may_make_its_own_key(tmp_path):
    elsewhere = tmp_path / "site"
    make_certificates(elsewhere, [], nodes=["clinic"], days=1)
    folder = tmp_path / "certificates"
    folder.mkdir()
    (folder / "clinic.pub").write_bytes((elsewhere / "clinic.pub").read_bytes())
    made = make_certificates(folder, [], nodes=["clinic"], days=1)
    assert [file.name for file in made][-2:] == ["clinic.pem", "clinic.crt"]
    assert not (folder / "clinic").exists()
    assert [member.name for member in read_roster(folder / "nodes.yaml")] == ["clinic"]


def test_the_roster_follows_the_keys_and_keeps_what_was_edited(tmp_path):
    names = [f"node{number}" for number in range(1, 12)]
    make_certificates(tmp_path, [], names, days=1)
    file = tmp_path / "nodes.yaml"
    members = read_roster(file)
    assert [(m.partition, m.name) for m in members] == list(enumerate(names))
    edited = [replace(members[0], name="Charité", partition=20), *members[1:]]
    write_roster(file, edited)
    remove_nodes(tmp_path, ["node2"])
    make_certificates(tmp_path, [], ["hospital-b"], days=1)
    known = {member.name: member.partition for member in read_roster(file)}
    assert known.pop("Charité") == 20
    assert known.pop("hospital-b") == 0
    assert known == {f"node{number}": number - 1 for number in range(3, 12)}
    assert not list(tmp_path.glob("node2*"))


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["../node"], "must be at most 64 letters"),
        (["a b"], "must be at most 64 letters"),
        (["a\n"], "must be at most 64 letters"),
        (["x" * 65], "must be at most 64 letters"),
        (["ca"], "is the name of another file"),
        (["node1.pub"], "is the name of another file"),
    ],
)
def test_a_node_name_that_is_none_gets_one_line(tmp_path, names, reason):
    with pytest.raises(UserError, match=reason):
        make_certificates(tmp_path, [], names, days=1)


def test_a_node_that_is_not_there_can_not_be_removed(tmp_path):
    make_certificates(tmp_path, [], ["a", "b"], days=1)
    with pytest.raises(UserError, match="c: no such node; known: a, b"):
        remove_nodes(tmp_path, ["c"])
    for every in (["a", "b"], ["a", "b", "a"]):
        with pytest.raises(UserError, match="at least one node"):
            remove_nodes(tmp_path, every)
    assert len(read_roster(tmp_path / "nodes.yaml")) == 2


def test_the_script_adds_removes_and_keeps_the_door_s_settings(tmp_path):
    def script(*arguments):
        command = [sys.executable, "-m", "scripts.certificates", "--out", str(tmp_path / "c")]
        done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    def nodes():
        return [member.name for member in read_roster(tmp_path / "c" / "nodes.yaml")]

    assert script("--hosts", "a.example.org", "--port", "9443")[0] == 0
    assert nodes() == ["node1", "node2"]
    assert script("--names", "hospital-a")[0] == 0
    assert script("--remove", "node1")[0] == 0
    assert nodes() == ["node2", "hospital-a"]
    configuration = (tmp_path / "c" / "nginx.conf").read_text()
    assert "listen 9443 ssl;" in configuration
    assert configuration.count('"hospital-a";') == 2
    assert '"node1"' not in configuration
    for arguments in (["--remove", "nobody"], ["--nodes", "0"], ["--names", "/"]):
        status, output = script(*arguments)
        assert (status, output.count("\n")) == (2, 1), output


def test_other_names_for_an_existing_certificate_get_one_line(tmp_path):
    make_certificates(tmp_path, [], nodes=["node1"], days=1)
    with pytest.raises(UserError, match=r"b\.example\.org: .*server\.crt was made without it"):
        make_certificates(tmp_path, ["b.example.org"], nodes=["node1"], days=1)


@pytest.mark.parametrize("name", ["a:8000", "https://a", "", "a b", "x" * 70 + ".org"])
def test_a_name_that_is_none_gets_one_line(tmp_path, name):
    with pytest.raises(UserError, match="neither a name nor an address"):
        make_certificates(tmp_path, [name], nodes=["node1"], days=1)
