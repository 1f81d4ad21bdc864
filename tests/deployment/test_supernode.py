"""What a site adds to Flower's SuperNode, and that Flower still has the places for it."""

import hashlib
import inspect
import os
import ssl
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import ROOT
from flwr.app import Message, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.common.constant import ErrorCode
from flwr.supercore.constant import PULL_INITIAL_BACKOFF, TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError
from flwr.supercore.run import Run
from flwr.supercore.superexec.executor import subprocess_executor
from flwr.supercore.superexec.executor.types import ExecutionSpec
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import fleet_http_connection, start_client_internal

from fedssl.deployment import superexec, supernode
from fedssl.deployment.bundle import digest_of
from fedssl.deployment.certificates import make_certificates
from fedssl.deployment.supernode import ForeignRun, check_bundle, present_certificate, pull_eagerly
from fedssl.pulling import PAUSE, PULLS, pull_soon

NAME, VERSION = "federated-simclr/federated-simclr", "1.1.0"


@pytest.fixture(scope="module")
def content():
    return build_fab_from_disk(ROOT)


@pytest.fixture
def fab(content):
    return Fab(hashlib.sha256(content).hexdigest(), content, {})


@pytest.fixture
def run(fab):
    empty = Run.create_empty(7)
    own = {"fab_id": NAME, "fab_version": VERSION, "fab_hash": fab.hash_str}
    return replace(empty, **own, primary_task_type=str(TaskType.SERVER_APP))


def test_the_sites_own_bundle_is_let_in(fab, run):
    check_bundle(fab, run, digest_of(fab.content))


@pytest.mark.parametrize(
    "claim", [{"fab_id": "federated-simclr/other"}, {"fab_version": "../x"}, {"fab_hash": "0" * 64}]
)
def test_a_run_that_names_another_unpacked_bundle_is_refused(fab, run, claim):
    with pytest.raises(ForeignRun, match=r"is federated-simclr/federated-simclr 1\.1\.0"):
        check_bundle(fab, replace(run, **claim), digest_of(fab.content))
    with pytest.raises(ForeignRun, match="is federated-simclr"):
        check_bundle(Fab("1" * 64, fab.content, {}), run, digest_of(fab.content))


def test_what_is_no_bundle_is_refused(run):
    with pytest.raises(ForeignRun, match="no zip archive"):
        check_bundle(Fab("", b"PK", {}), run, "0" * 64)


@pytest.fixture
def pull(monkeypatch):
    """Give Flower's step that pulls a message, as it is replaced, and what it answers."""
    replies = []
    monkeypatch.setattr(supernode, "POLL_EVERY_S", 0.01)
    flowers = start_client_internal._pull_and_store_message
    monkeypatch.setattr(start_client_internal, "_pull_and_store_message", flowers)
    for name in ("_run_id", "_node_id", "_task_id"):  # of who makes the message
        monkeypatch.setattr(TaskIdentity, name, 7)

    def keep(message, state, store):
        replies.append(message)

    monkeypatch.setattr(start_client_internal, "_insert_message", keep)

    def make(run, fab, only_bundle):
        message = Message(RecordDict(), dst_node_id=3, message_type="query")
        message.metadata.__dict__["_message_id"] = "message"
        mailbox = [None, None, (message, "tree")]  # Flower sleeps 3 s after each None
        pull_eagerly(only_bundle)
        step = start_client_internal._pull_and_store_message
        state = SimpleNamespace(get_run=lambda run_id: None)
        given = dict.fromkeys(inspect.signature(flowers).parameters)
        given |= {"state": state, "object_store": None, "receive": lambda: mailbox.pop(0)}
        given |= {"get_run": lambda run_id: run, "get_fab": lambda fab_hash, run_id: fab}
        return step(**given), mailbox, replies

    return make


def test_a_foreign_bundle_is_answered_with_an_error_before_it_is_opened(
    pull, fab, run, monkeypatch
):
    def opened(*_):
        raise AssertionError("opened")

    monkeypatch.setattr(start_client_internal, "get_fused_config_from_fab", opened)
    run_id, mailbox, (reply,) = pull(run, fab, "0" * 64)
    assert (run_id, mailbox) == (7, [])
    assert reply.error.code == ErrorCode.INVALID_FAB
    assert digest_of(fab.content)[:12] in reply.error.reason
    assert "0" * 12 in reply.error.reason


@pytest.mark.parametrize("kind", [TaskType.AGENT_APP, TaskType.MODEL, ""])
def test_a_run_that_is_no_serverapps_is_refused(pull, fab, run, kind):
    _, _, (reply,) = pull(replace(run, primary_task_type=str(kind)), fab, digest_of(fab.content))
    assert reply.error.reason == f"this node runs no {kind or 'unknown task'}"


@pytest.mark.parametrize("only_bundle", [None, "own"])
def test_flower_goes_on_with_a_bundle_that_is_let_in(pull, fab, run, monkeypatch, only_bundle):
    def opened(*_):
        raise AssertionError("opened")

    monkeypatch.setattr(start_client_internal, "get_fused_config_from_fab", opened)
    with pytest.raises(AssertionError, match="opened"):
        pull(run, fab, only_bundle and digest_of(fab.content))


def test_flower_calls_the_step_by_name_and_with_a_pause_after_nothing():
    """The replaced step takes keywords only, and never returns None."""
    text = inspect.getsource(start_client_internal.start_client_internal)
    for name in ("receive", "get_run", "get_fab", "state", "object_store"):
        assert f"{name}={name}" in text or f"{name}=store" in text or f"{name}=state" in text
    assert "run_id = _pull_and_store_message(" in text
    assert text.index("if run_id is None") < text.index("time.sleep(3)")


def test_flowers_client_presents_the_certificate(tmp_path, monkeypatch):
    make_certificates(tmp_path, [], nodes=[], days=1)
    both = tmp_path / "both.pem"
    files = [tmp_path / "server.crt", tmp_path / "server.key"]
    both.write_bytes(b"".join(file.read_bytes() for file in files))
    loaded = []
    monkeypatch.setattr(
        ssl.SSLContext, "load_cert_chain", lambda context, file: loaded.append((context, file))
    )
    flowers = fleet_http_connection.FleetHttpClient
    monkeypatch.setattr(fleet_http_connection, "FleetHttpClient", flowers)
    present_certificate(both)
    used = fleet_http_connection.FleetHttpClient
    for known in (str(tmp_path / "ca.crt"), (tmp_path / "ca.crt").read_bytes(), None):
        with used.from_server_address("127.0.0.1:1", False, known, []):
            context, file = loaded.pop()
        assert file == both
        assert context.verify_mode == ssl.CERT_REQUIRED
        assert context.check_hostname
    assert "FleetHttpClient.from_server_address(" in inspect.getsource(
        fleet_http_connection.http_request_response
    )


def run_in_a_forks_parent(code):
    """Run code in a process as the superexec's is; give what it and its forks print."""
    begin = "from fedssl.deployment.superexec import *; start_fork_server(); "
    given = [sys.executable, "-c", begin + code]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(given, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def test_a_message_begins_in_a_fork_that_has_pytorch_and_no_module_of_an_app():
    told = "import sys; print([name in sys.modules for name in ('torch', 'torchvision', "
    told += "'hydra', 'flwr', 'fedssl', 'client', 'utils')])"
    done = run_in_a_forks_parent(f"p = multiprocessing.Process(target=exec, args=({told!r},)); "
                                 "p.start(); p.join()")  # fmt: skip
    assert done.stdout.split("\n")[0] == str([True] * 4 + [False] * 3), done.stderr


def test_a_fork_runs_flowers_command_with_its_arguments():
    done = run_in_a_forks_parent("fork(['flwr-clientapp', '--help']).join()")
    assert "usage: flwr-clientapp" in done.stdout, done.stderr


def test_flower_has_the_places_where_forks_come_in(monkeypatch):
    """Its SuperNode starts a superexec, and that a process for a ClientApp, each by Popen."""
    started = []
    monkeypatch.setattr(start_client_internal, "subprocess", subprocess)
    plain = SimpleNamespace(Popen=started.append)
    monkeypatch.setattr(supernode, "subprocess", plain)
    supernode.fork_for_messages()
    start_client_internal.subprocess.Popen(["flower-superexec", "--insecure"])
    assert started == [
        [sys.executable, "-c", "from fedssl.deployment.superexec import main; main()", "--insecure"]
    ]
    source = inspect.getsource(start_client_internal.start_client_internal)
    assert 'command = ["flower-superexec"]' in source
    assert "subprocess.Popen(command)" in source

    monkeypatch.setattr(
        subprocess_executor, "subprocess", SimpleNamespace(Popen=started.append, DEVNULL=-3)
    )
    spec = ExecutionSpec(
        task_type=TaskType.CLIENT_APP,
        runtime_api_address="127.0.0.1:1",
        token="secret",
        insecure=True,
        root_certificates_path=None,
        runtime_dependency_install=False,
        parent_pid=7,
        suppress_output=False,
        task_id=1,
        fab_hash=None,
    )
    subprocess_executor.SubprocessExecutor().launch(spec)
    assert started[-1][0] == superexec.COMMAND
    assert "--parent-pid" in started[-1]


def test_who_asks_for_a_part_too_early_asks_again_soon(monkeypatch):
    defaults = {name: getattr(inflatable_utils, name).__kwdefaults__ for name in PULLS}
    for each in defaults.values():
        assert each[PAUSE] == PULL_INITIAL_BACKOFF == 1
        monkeypatch.setitem(each, PAUSE, 1)
    asked = []

    def pull(part):
        asked.append(time.monotonic())
        if len(asked) < 4:
            raise ObjectUnavailableError(part)
        return b"content"

    pull_soon()
    assert inflatable_utils.pull_objects(["part"], pull) == {"part": b"content"}
    assert asked[-1] - asked[0] < 0.9  # 0.05, 0.1 and 0.2 s, a fifth more or less
