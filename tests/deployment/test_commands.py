"""What the two commands check, and how they watch over a process."""

import os
import socket
import sys
import time

import pytest

from fedssl.deployment.checks import check_node_config, check_port, check_run_config, free_port
from fedssl.deployment.commands import environment, write_toml
from fedssl.deployment.superlink import Link, Watched, await_link
from fedssl.errors import UserError

NOBODY = Link(f"127.0.0.1:{free_port()}", True, None)


def python(code):
    return Watched([sys.executable, "-c", code], environment())


def test_overrides_survive_the_way_through_flower(tmp_path):
    from flwr.common.config import parse_config_args

    path = """output_dir='a "b" c'"""
    values = check_run_config('hydra-overrides="num_rounds=3"', [path])
    file = write_toml(tmp_path / "run.toml", values)
    read = parse_config_args([str(file)])["hydra-overrides"]
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


def test_waiting_for_a_superlink_has_an_end(capsys):
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"no SuperLink at .*Connection refused"):
        await_link(NOBODY, 0.5)
    assert time.monotonic() - began < 3
    assert "Waiting up to 0.5 s" in capsys.readouterr().out


def test_a_silent_superlink_counts_as_not_there(monkeypatch):
    monkeypatch.setattr("fedssl.deployment.superlink.PROBE_TIMEOUT_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        link = Link(f"127.0.0.1:{silent.getsockname()[1]}", True, None)
        with pytest.raises(RuntimeError, match=r"no SuperLink at .*timed out"):
            await_link(link, 0.1)


def test_a_process_without_its_superlink_is_given_up(monkeypatch):
    monkeypatch.setattr("fedssl.deployment.superlink.PROBE_EVERY_S", 0.1)
    node = python("import time; time.sleep(60)")
    try:
        with pytest.raises(RuntimeError, match=r"has been gone for 0.3 s"):
            node.wait(NOBODY, 0.3)
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
    assert node.wait(NOBODY, 60) == 5
    assert "Exit Code: 305" in capsys.readouterr().out
    assert node.reason() == "Failed to initialize the connection. [code: 3] Unknown SuperNode."


def test_flowers_commands_are_found_without_an_activated_environment():
    first = environment()["PATH"].split(os.pathsep)[0]
    assert os.path.exists(os.path.join(first, "flower-supernode"))
    assert environment(FLWR_HOME="x")["FLWR_HOME"] == "x"
