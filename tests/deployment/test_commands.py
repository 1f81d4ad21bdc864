"""What the two commands check, and how they watch over a process."""

import http.server
import os
import socket
import stat
import subprocess
import sys
import threading
import time

import httpx
import pytest

from fedssl.deployment.certificates import make_certificates
from fedssl.deployment.checks import (
    check_app,
    check_file,
    check_link,
    check_node_config,
    check_port,
    check_run_config,
    free_port,
)
from fedssl.deployment.commands import (
    _parser,
    environment,
    pass_proxies,
    without_proxy,
    write_toml,
)
from fedssl.deployment.node import Node, Presence, reason_of
from fedssl.deployment.process import ChildProcess
from fedssl.deployment.superlink import (
    ConnectionRefused,
    SuperLinkAddress,
    Watch,
    await_superlink,
)
from fedssl.errors import UserError

NOBODY = SuperLinkAddress(f"127.0.0.1:{free_port()}", True, None)


def python(code):
    return ChildProcess([sys.executable, "-c", code], environment())


@pytest.fixture
def answering():
    """A plain HTTP server that gives to every GET the status and body that the test sets."""

    class Answer(http.server.BaseHTTPRequestHandler):
        status, body = 405, ""

        def do_GET(self):
            self.server.asked = self.path
            self.send_response(self.status)
            self.end_headers()
            self.wfile.write(self.body.encode())

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.answer = Answer
    server.link = SuperLinkAddress(f"127.0.0.1:{server.server_address[1]}", True, None)
    yield server
    server.shutdown()


def test_overrides_survive_the_way_through_flower():
    from flwr.common.serde import user_config_from_proto, user_config_to_proto

    path = """output_dir='a "b" c'"""
    values = check_run_config('hydra-overrides="num_rounds=3"', [path])
    read = user_config_from_proto(user_config_to_proto(values))["hydra-overrides"]
    assert check_run_config("", [])["hydra-overrides"] == ""
    assert read == values["hydra-overrides"]
    assert read.startswith("num_rounds=3 ")


def test_a_folder_with_odd_letters_survives(tmp_path):
    from flwr.common.config import parse_config_args

    folder = tmp_path / "it's own"
    folder.mkdir()
    (folder / "image.png").touch()
    values = check_node_config(f'partition-id=1 data-path="{folder}"')
    file = write_toml(tmp_path / "node.toml", values)
    assert parse_config_args([str(file)]) == {"partition-id": 1, "data-path": str(folder)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "no key=value pair"),
        ("partition-id=x", "write key=1"),
        ("partition-id=-1", "partition-id=-1: must be a whole number"),
        ("partition-id=true", "must be a whole number"),
        ("num-partition=2", "known: num-partitions"),
    ],
)
def test_a_wrong_node_configuration_gets_one_line(text, message):
    with pytest.raises(UserError, match=message):
        check_node_config(text)


@pytest.mark.parametrize("port", [-1, 70_000])
def test_an_impossible_port_gets_one_line(port):
    with pytest.raises(UserError, match=f"--port={port}"):
        check_port(port)


def test_the_apps_are_found_without_importing_them():
    code = "import sys; from fedssl.deployment.checks import check_app; "
    code += "print(check_app('app:client2', 'clientapp'), check_app('app:server', 'serverapp'), "
    code += "'torch' in sys.modules, 'app' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["client2", "server", "False", "False"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def server(): pass", "app has no ServerApp 'server'"),
        ("server = ClientApp()", "app has no ServerApp 'server'"),
        ("servers = flwr.ServerApp()", "did you mean app:servers"),
        ("server = = 1", "app.py can't be read"),
    ],
)
def test_another_kind_of_app_gets_one_line(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text(
        '[tool.flwr.app.components]\nserverapp = "app:server"\nclientapp = "app:client"\n'
    )
    (tmp_path / "app.py").write_text(text)
    with pytest.raises(UserError, match=message):
        check_app("app:server", "serverapp")


def test_a_client_certificate_is_checked_before_anything_starts(tmp_path):
    make_certificates(tmp_path, [], nodes=[], days=1)
    both = tmp_path / "both.pem"
    parser = _parser("x", "app:client", "a ClientApp")
    given = parser.parse_args(["app:client", "--root-certificates", str(tmp_path / "ca.crt")])
    given.certificate = tmp_path / "server.crt"
    with pytest.raises(UserError, match="must hold a certificate and its key"):
        check_link(given)
    both.write_bytes(
        (tmp_path / "server.crt").read_bytes() + (tmp_path / "server.key").read_bytes()
    )
    given.certificate = both
    assert check_link(given).certificate == both
    given.insecure, given.root_certificates = True, None
    with pytest.raises(UserError, match="exclude each other"):
        check_link(given)


def test_waiting_for_a_superlink_has_an_end(capsys):
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"no SuperLink at .*Connection refused"):
        await_superlink(NOBODY, 0.5)
    assert time.monotonic() - began < 3
    assert "Waiting up to 0.5 s" in capsys.readouterr().out


def test_a_silent_superlink_counts_as_not_there(monkeypatch):
    monkeypatch.setattr("fedssl.deployment.superlink.PROBE_TIMEOUT_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        link = SuperLinkAddress(f"127.0.0.1:{silent.getsockname()[1]}", True, None)
        with pytest.raises(RuntimeError, match=r"no SuperLink at .*timed out"):
            await_superlink(link, 0.1)


@pytest.mark.parametrize("status", [200, 401, 404, 405, 429])
def test_any_answer_of_a_superlink_is_a_sign_of_life(answering, status):
    answering.answer.status = status
    answering.link.probe()
    assert answering.asked == "/v1/fleet/pull-messages"


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_proxy_without_its_superlink_counts_as_not_there(answering, status):
    answering.answer.status = status
    with pytest.raises(RuntimeError, match=f"its proxy answers {status}"):
        await_superlink(answering.link, 0.1)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "400 No required SSL certificate was sent",
            "asks for a client.*--certificate",
        ),
        ("400 The SSL certificate error", r"not accepted.*--certificate"),
        ("400 The plain HTTP request was sent to HTTPS port", "only takes encrypted"),
    ],
)
def test_a_proxy_that_wants_a_certificate_refuses_at_once(answering, body, message):
    answering.answer.status, answering.answer.body = 400, body
    with pytest.raises(RuntimeError, match=message):
        await_superlink(answering.link, 60)


class Proxy(http.server.BaseHTTPRequestHandler):
    """Answers for the SuperLink, and opens no tunnel."""

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Proxy-Authorization")))
        self.send_response(405)
        self.end_headers()

    def do_CONNECT(self):
        self.server.asked.append((self.path, self.headers.get("Proxy-Authorization")))
        self.send_error(403)

    def log_message(self, *_):
        pass


def test_a_sign_of_life_is_asked_for_by_the_proxy_that_leads_there(monkeypatch):
    server = http.server.HTTPServer(("127.0.0.1", 0), Proxy)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"http://me:word@127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("no_proxy", "localhost")
    monkeypatch.setenv("NO_PROXY", "localhost")
    login = "Basic bWU6d29yZA=="  # me:word
    try:
        SuperLinkAddress("superlink.example:8000", True, None).probe()
        encrypted = SuperLinkAddress("superlink.example:8443", False, None)
        with pytest.raises(RuntimeError, match=r"8443, by the proxy http://127\.0\.0\.1:.*403"):
            await_superlink(encrypted, 0.1)
    finally:
        server.shutdown()
    (path, given), *tunnels = server.asked
    assert (path, given) == ("http://superlink.example:8000/v1/fleet/pull-messages", login)
    assert set(tunnels) == {("superlink.example:8443", login)}


def test_open_quotes_and_files_of_others_get_one_line(tmp_path):
    with pytest.raises(UserError, match=r"hydra-overrides=.*close the quotes"):
        check_run_config('hydra-overrides="dataset.name=\'x"', [])
    with pytest.raises(UserError, match=r"--certificate=.*: can't be read"):
        check_file("--certificate", tmp_path / ("x" * 300))


def test_a_process_without_its_superlink_is_given_up(monkeypatch):
    monkeypatch.setattr("fedssl.deployment.superlink.PROBE_EVERY_S", 0.1)
    node = python("import time; time.sleep(60)")
    try:
        with pytest.raises(RuntimeError, match=r"has been gone for 0.3 s"):
            node.wait(Watch(NOBODY, 0.3))
    finally:
        node.stop()
    assert node.process.returncode is not None


def test_stopping_takes_the_children_along():
    start = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'input()'], "
    start += "stdin=subprocess.PIPE); print(p.pid, flush=True); p.wait()"
    node = python(start)
    while not node.last_lines:
        time.sleep(0.05)
    child = int(node.last_lines[0])
    node.stop()
    deadline = time.monotonic() + 5
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_output_is_passed_on_and_the_reason_found(capsys):
    flower = (
        "\\x1b[91mERROR \\x1b[0m:     Exit Code: 305\\nFailed to initialize the connection.\\n"
        "[code: 3] Unknown SuperNode.\\n\\nFor more information, visit: <https://flower.ai>"
    )
    node = python(f'import sys; print("""{flower}"""); sys.exit(5)')
    assert node.wait(Watch(NOBODY, 60)) == 5
    node.stop()
    assert "Exit Code: 305" in capsys.readouterr().out
    reason = reason_of(list(node.last_lines))
    assert reason == "Failed to initialize the connection. [code: 3] Unknown SuperNode."


def test_flowers_commands_are_found_without_an_activated_environment():
    first = environment()["PATH"].split(os.pathsep)[0]
    assert os.path.exists(os.path.join(first, "flower-superexec"))
    assert environment(FLWR_HOME="x")["FLWR_HOME"] == "x"


@pytest.mark.parametrize("given", ["", "intern.example,10.1.1.1"])
def test_this_machine_and_private_addresses_lie_on_this_side_of_a_proxy(
    answering, monkeypatch, given
):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, NOBODY.address)
    monkeypatch.setenv("NO_PROXY", given)
    monkeypatch.setenv("no_proxy", given)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://{answering.link.address}/")
    for name, value in without_proxy("10.0.0.5").items():
        monkeypatch.setenv(name, value)
    assert httpx.get(f"http://{answering.link.address}/").status_code == 405
    names = os.environ["NO_PROXY"].split(",")
    assert names == [*filter(None, given.split(",")), "localhost", "127.0.0.1", "::1", "10.0.0.5"]
    assert "8.8.8.8" not in without_proxy("8.8.8.8")["NO_PROXY"]
    assert environment()["no_proxy"] == environment()["NO_PROXY"]


def test_a_door_that_does_not_know_the_certificate_refuses(answering):
    answering.answer.status = 403
    with pytest.raises(ConnectionRefused, match=r"nodes\.yaml does not name it"):
        answering.link.probe()


def test_only_a_node_that_was_connected_a_moment_ago_may_be_taken_for_connected(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    key, other = tmp_path / "key", tmp_path / "other"
    assert not Presence(key).is_recent()
    Presence(key).note()
    assert Presence(key).is_recent()
    assert not Presence(other).is_recent()
    (file,) = (tmp_path / "connected").iterdir()
    long_ago = time.time() - 1000
    os.utime(file, (long_ago, long_ago))
    assert not Presence(key).is_recent()
    Presence(key).note()
    Presence(key).clear()
    assert not Presence(key).is_recent()
    assert stat.S_IMODE((tmp_path / "connected").stat().st_mode) == 0o700


SUPERNODES = {  # what Flower's command may do
    "refused": "print('[code: 2004] no'); raise SystemExit(1)",
    "lost": "print('INFO: SuperNode ID: 7'); raise SystemExit(0)",
}


@pytest.fixture
def node(answering, tmp_path, monkeypatch):
    """Give nodes whose SuperNode is a line of Python, which notes its starts in a file."""
    monkeypatch.setattr("fedssl.deployment.node.RETRY_EVERY_S", 0.1)
    monkeypatch.setattr("fedssl.deployment.superlink.PROBE_EVERY_S", 0.1)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def make(kind, max_wait_s, key=None):
        code = f"open('starts', 'a').write('x'); {SUPERNODES[kind]}"
        monkeypatch.setattr("fedssl.deployment.node.SUPERNODE", [sys.executable, "-c", code])
        return Node([], environment(), answering.link, max_wait_s, key)

    make.starts = lambda: len((tmp_path / "starts").read_text())
    return make


def test_a_node_that_is_refused_at_its_first_start_ends_at_once(node):
    with pytest.raises(RuntimeError, match="does not know this node's key"):
        node("refused", 60).run()
    assert node.starts() == 1


def test_a_refusal_after_a_death_without_goodbye_is_tried_again(node, tmp_path):
    key = tmp_path / "key"
    Presence(key).note()
    with pytest.raises(RuntimeError, match=r"does not know this node's key.*again for 0.5 s"):
        node("refused", 0.5, key).run()
    assert node.starts() > 1


def test_a_node_that_loses_its_superlink_connects_again(node, capsys):
    with pytest.raises(RuntimeError, match=r"tried again for 0.5 s"):
        node("lost", 0.5).run()
    assert node.starts() > 1
    assert "it connects again" in capsys.readouterr().out


def test_both_spellings_of_no_proxy_count_and_names_of_private_addresses(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "a.example, b.example")
    monkeypatch.setenv("no_proxy", "c.example")
    known = {
        "near.example": "192.168.1.5",
        "shared.example": "100.64.0.1",
        "far.example": "8.8.8.8",
    }

    def resolve(host, port):
        return [(None, None, None, "", (known[host], 0))]

    monkeypatch.setattr("socket.getaddrinfo", resolve)
    names = without_proxy("near.example")["no_proxy"].split(",")
    assert names[:3] == ["a.example", "b.example", "c.example"]
    assert names[-1] == "near.example"
    assert "shared.example" in without_proxy("shared.example")["no_proxy"]
    assert "far.example" not in without_proxy("far.example")["no_proxy"]


@pytest.mark.parametrize("name", ["all_proxy", "http_proxy", "https_proxy"])
@pytest.mark.parametrize("url", ["socks://me:word@127.0.0.1:1080/", "socks5://127.0.0.1:1"])
def test_a_proxy_that_flower_cannot_use_is_named(monkeypatch, name, url):
    for other in ("all_proxy", "http_proxy", "https_proxy"):
        monkeypatch.delenv(other, raising=False)
        monkeypatch.delenv(other.upper(), raising=False)
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv(name, url)
    with pytest.raises(UserError, match=f"{name}=socks") as error:
        pass_proxies(NOBODY)
    assert "word" not in str(error.value)
    monkeypatch.setenv(name, "proxy.example:3128")
    pass_proxies(NOBODY)
    assert NOBODY.proxy == ""


def test_a_line_names_the_proxy_that_leads_to_a_public_address(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://me:word@proxy.example:3128")
    monkeypatch.setenv("no_proxy", "localhost")
    assert SuperLinkAddress("8.8.8.8:8000", True, None).proxy == (
        ", by the proxy http://proxy.example:3128"
    )
