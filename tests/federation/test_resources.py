"""How simulated clients share machines, and which machines a cluster has."""

import socket

import pytest

from fedssl.errors import UserError
from fedssl.federation.resources import Machine, clients_per_round, find_machines, plan_resources


@pytest.mark.parametrize(
    ("asked", "machine", "expected"),
    [
        # (clients, cpus, gpus), (cores, gpus) -> (cpus, gpus, at a time)
        ((5, None, None), (2, 0), (2, 0, 1)),
        ((6, None, None), (2, 0), (1, 0, 2)),
        ((5, None, None), (8, 0), (1, 0, 5)),
        ((5, None, None), (16, 0), (3, 0, 5)),
        ((5, 2, None), (2, 0), (2, 0, 1)),
        ((2, 2, 0), (16, 1), (2, 0, 2)),
        ((5, None, None), (16, 1), (16, 1, 1)),
        ((5, 2, 0.25), (16, 1), (2, 0.25, 4)),
        ((5, None, 0.25), (16, 1), (4, 0.25, 4)),
        ((100, None, None), (8, 0), (1, 0, 8)),
    ],
)
def test_the_machine_is_shared_among_the_clients(asked, machine, expected):
    plan = plan_resources(*asked, [Machine(*machine)])
    assert (plan.num_cpus, plan.num_gpus, plan.at_a_time) == expected


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((5, 3, None), "num_cpus=3: this machine has 2 cores"),
        ((5, None, 0.25), "num_gpus=0.25: PyTorch finds no GPU"),
    ],
)
def test_more_than_the_machine_has_is_refused(asked, message):
    with pytest.raises(UserError, match=message):
        plan_resources(*asked, [Machine(2, 0)])


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        # (clients, cpus, gpus) on machines of 8, 4 and 4 cores, a GPU in two of them
        ((100, None, 0), (1, 0, 16)),
        ((4, None, 0), (4, 0, 4)),
        ((4, 3, 0), (3, 0, 4)),
        ((100, 8, 0), (8, 0, 1)),
        ((100, 1, 0.5), (1, 0.5, 4)),
    ],
)
def test_no_client_spans_two_machines(asked, expected):
    machines = [Machine(8, 1), Machine(4, 0), Machine(4, 1)]
    plan = plan_resources(*asked, machines)
    assert (plan.num_cpus, plan.num_gpus, plan.at_a_time) == expected


def test_the_share_of_each_machine_of_a_cluster_is_told():
    machines = [Machine(8, 1, "alpha"), Machine(4, 0, "beta"), Machine(4, 1, "gamma")]
    assert str(plan_resources(100, None, 0, machines)) == (
        "16 clients at a time, each on 1 CPU core:\n8 on alpha, 4 on beta, 4 on gamma"
    )
    shared = str(plan_resources(100, 1, 0.5, machines))
    assert shared.endswith("1 CPU core and 0.5 GPU:\n2 on alpha, 0 on beta, 2 on gamma")
    assert "on " not in str(plan_resources(5, None, 0, machines[:1])).partition("each on")[2]


@pytest.mark.parametrize(
    ("clients", "fraction", "expected"), [(5, 1.0, 5), (5, 0.4, 2), (5, 0.1, 1), (1000, 0.01, 10)]
)
def test_a_share_of_the_clients_trains_in_a_round(clients, fraction, expected):
    assert clients_per_round(clients, fraction) == expected


@pytest.mark.parametrize("address", ["here", "here:x", "127.0.0.1:70000"])
def test_a_wrong_cluster_address_gets_one_line(address):
    with pytest.raises(UserError, match=f"ray_address={address}: "):
        find_machines(address)


def test_a_cluster_that_is_not_there_gets_one_line():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(UserError, match=r"no answer .*ray start --head"):
            find_machines(address)


def test_a_machine_that_cannot_reach_itself_is_told_at_once(monkeypatch):
    def refuse(*given, **named):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(UserError, match=r"Network is unreachable.*ip link set lo up"):
        find_machines(None)
