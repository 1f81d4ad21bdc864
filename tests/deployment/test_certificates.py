"""Certificates and keys: what they are good for, who may read them, what is kept."""

import http.server
import ssl
import stat
import threading

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedssl.deployment.certificates import make_certificates
from fedssl.deployment.superlink import ConnectionRefused as Refused
from fedssl.deployment.superlink import SuperLinkAddress as Link
from fedssl.errors import UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls") / "certificates"
    make_certificates(folder, ["superlink.example.org", "10.0.0.5"], nodes=2, days=10)
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
    make_certificates(tmp_path, [], nodes=1, days=1)
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


def test_private_keys_are_private(made):
    for name in ("ca.key", "server.key", "node1", "node2"):
        assert stat.S_IMODE((made / name).stat().st_mode) == 0o600


def test_nodes_can_be_added_and_nothing_is_replaced(tmp_path):
    make_certificates(tmp_path, ["a.example.org"], nodes=1, days=1)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    made = make_certificates(tmp_path, ["a.example.org"], nodes=2, days=1)
    assert [file.name for file in made] == ["node2", "node2.pub"]
    assert all((tmp_path / name).read_bytes() == data for name, data in before.items())


def test_other_names_for_an_existing_certificate_get_one_line(tmp_path):
    make_certificates(tmp_path, [], nodes=1, days=1)
    with pytest.raises(UserError, match=r"b\.example\.org: .*server\.crt was made without it"):
        make_certificates(tmp_path, ["b.example.org"], nodes=1, days=1)


@pytest.mark.parametrize("name", ["a:8000", "https://a", "", "a b", "x" * 70 + ".org"])
def test_a_name_that_is_none_gets_one_line(tmp_path, name):
    with pytest.raises(UserError, match="neither a name nor an address"):
        make_certificates(tmp_path, [name], nodes=1, days=1)
