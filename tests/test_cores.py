"""SuperNodes on one machine find each other and share its cores."""

import re
import subprocess
import sys

import pytest

from fedssl.compute import CoreShare, Process, count_cores, share_cores

PYTHON = "/usr/bin/python3.11"
NODE = (PYTHON, "/opt/bin/flower-supernode", "--superlink", "127.0.0.1:8000")
OWN = (PYTHON, "-m", "fedssl.deployment.supernode", "--insecure")
SUPEREXEC = (PYTHON, "/opt/bin/flower-superexec", "--plugin-type", "clientapp")
CLIENTAPP = (PYTHON, "/opt/bin/flwr-clientapp", "--token", "x")
LAUNCHER = (PYTHON, "/opt/bin/flower-client-app", "app:client1", "--insecure")


def machine(*nodes):
    """Make the processes of nodes, each with launcher, executor and app: app's pid is 10n + 3."""
    found = [Process(1, 0, 0, ("/sbin/init",))]
    for number, (command, started) in enumerate(nodes, 1):
        chain = (LAUNCHER, command, SUPEREXEC, CLIENTAPP)
        for place, each in enumerate(chain):
            pid = 10 * number + place
            found.append(Process(pid, pid - 1 if place else 1, started + place, each))
    return found


@pytest.fixture
def cores(monkeypatch):
    def have(count):
        monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(count)))

    return have


@pytest.mark.parametrize(
    ("total", "started", "expected"),
    [
        (2, [1], [2]),
        (2, [1, 2], [1, 1]),
        (2, [1, 2, 3], [1, 1, 1]),
        (8, [1, 2, 3], [3, 3, 2]),
        (8, [300, 200, 100], [2, 3, 3]),
        (7, [5, 5], [4, 3]),
    ],
)
def test_cores_are_shared_evenly_and_the_first_take_what_remains(cores, total, started, expected):
    cores(total)
    processes = machine(*((NODE if n % 2 else OWN, start) for n, start in enumerate(started)))
    shares = [share_cores(processes, 10 * number + 13) for number in range(len(started))]
    assert [share.cores for share in shares] == expected
    assert {(share.of, share.nodes) for share in shares} == {(total, len(started))}


def test_a_node_that_ends_leaves_its_cores_to_the_others(cores):
    cores(4)
    both = machine((NODE, 1), (OWN, 2))
    assert share_cores(both, 13).cores == 2
    assert share_cores(both[:5], 13).cores == 4


@pytest.mark.parametrize(
    "command",
    [
        SUPEREXEC,
        CLIENTAPP,
        LAUNCHER,
        ("timeout", "60", *NODE[1:]),
        ("bash", "-c", " ".join(NODE)),
        ("vim", "flower-supernode.py"),
        (PYTHON, "-m", "pytest", "flower-supernode"),
        (PYTHON, "-c", "flower-supernode"),
        ("grep", "flower-supernode"),
        (),
    ],
)
def test_what_only_speaks_of_nodes_is_none(command):
    assert not Process(2, 1, 0, command).is_node


@pytest.mark.parametrize(
    "command",
    [NODE, OWN, NODE[1:], (PYTHON, "-u", "-X", "dev", *NODE[1:]), (PYTHON, "-I", *OWN[1:])],
)
def test_a_node_is_known_by_its_program(command):
    assert Process(2, 1, 0, command).is_node


def test_a_node_within_a_node_counts_once(cores):
    cores(4)
    processes = [*machine((NODE, 1), (NODE, 2)), Process(99, 11, 9, NODE)]
    assert share_cores(processes, 13) == CoreShare(2, 4, 2)


def test_who_belongs_to_no_node_takes_all(cores):
    cores(4)
    assert share_cores(machine((NODE, 1), (NODE, 2)), 7) == CoreShare(4, 4, 1)
    assert share_cores([], 7) == CoreShare(4, 4, 1)


def test_the_line_says_how_many_and_why():
    assert str(CoreShare(1, 2, 2)) == "takes 1 of 2 cores, shared by 2 nodes"
    assert str(CoreShare(2, 2, 1)) == "takes 2 of 2 cores"
    assert str(CoreShare(1, 1, 1)) == "takes 1 of 1 core"


def test_running_processes_are_found(tmp_path):
    """Two processes by the name of a SuperNode; the child of the first asks."""
    script = tmp_path / "flower-supernode"
    script.write_text(
        "import subprocess, sys\n"
        "ask = 'from fedssl.compute import share_cores; print(share_cores())'\n"
        "input()\n"
        "subprocess.run([sys.executable, '-c', ask])\n"
    )
    nodes = [
        subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        told = nodes[0].communicate("\n", timeout=60)[0]
    finally:
        for node in nodes:
            node.kill()
            node.wait()
    found = re.fullmatch(r"takes (\d+) of (\d+) cores?, shared by (\d+) nodes\s*", told)
    assert found, told
    took, total, count = map(int, found.groups())
    assert total == count_cores()
    assert count >= 2  # other tests may have nodes of their own
    assert took in (max(1, total // count), total // count + 1)
    assert share_cores() == CoreShare(total, total, 1)  # this process belongs to none
