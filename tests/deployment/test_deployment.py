"""The app as a real federation: SuperLink, SuperNodes and runs are processes on loopback.

Their logs lie in the test's temporary folder, which pytest keeps when a test
fails; the message of a failure shows the end of them.
"""

import json
import socket
import subprocess
import sys

import pytest
from deployment.place import TINY


def test_the_four_commands_give_the_numbers_of_the_simulation(place):
    rounds = ["num_rounds=1", "num_clients=2"]
    place.superlink()
    place.client(1)
    place.client(2)
    place.server(*rounds)
    assert place.end("server", 180) == 0, place.all_logs()
    assert "everything is in" in place.log("server")
    federated, run = place.rounds(), (place.outputs / "latest").resolve()
    names = {file.name for file in run.iterdir() if not file.name.startswith(("events.", "."))}
    assert names == {
        *("checkpoints", "config.yaml", "encoder.safetensors", "loss_graph.png"),
        *("metrics.jsonl", "overrides.yaml"),
    }
    assert not (place.home / ".flwr" / "config.toml").exists()  # the user's configuration
    place.stop_all()

    places = [f"output_dir={place.folder}/simulated", f"cache_dir={place.folder}/cache"]
    quick = ["eval.seeds=1", "eval.epochs=1"]
    main = [sys.executable, "main.py", *places, *quick, *TINY, *rounds]
    status, output = place.run(*main)
    assert status == 0, output
    file = place.folder / "simulated/latest/metrics.jsonl"
    for ours, theirs in zip(federated, map(json.loads, file.open()), strict=True):
        for key in ("train_loss", "eval_loss", "knn"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key
        assert ours["failures"] == []
        for client, other in zip(ours["clients"], theirs["clients"], strict=True):
            assert client["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)


@pytest.mark.slow
def test_flwr_run_simulates(place):
    """`flwr run .` starts a SuperLink of its own, which Flower leaves running."""
    overrides = [*TINY, "num_rounds=1", f"output_dir={place.outputs}"]
    overrides += [f"cache_dir={place.folder}/cache"]
    try:
        status, output = place.run(
            *("flwr", "run", ".", "--stream", "--federation-config", "num-supernodes=2"),
            *("--run-config", f'hydra-overrides="{" ".join(overrides)}"'),
        )
        assert status == 0, output
        assert (place.outputs / "latest" / "metrics.jsonl").is_file(), output
        assert len(place.rounds()[0]["clients"]) == 2
        assert (place.outputs / "latest" / "encoder.safetensors").is_file()
    finally:
        subprocess.run(["pkill", "-f", f"{place.home}/.flwr/local-superlink"])


GONE = "its node is gone, no heartbeat any more"


@pytest.mark.slow
def test_a_node_that_dies_is_left_out_and_taken_back(place):
    """In a run that Flower's own command starts."""
    place.superlink()
    place.client(1)
    place.client(2)
    (place.home / ".flwr").mkdir(exist_ok=True)
    (place.home / ".flwr" / "config.toml").write_text(
        f'[superlink.two-sites]\naddress = "{place.link}"\ninsecure = true\n'
    )
    overrides = [*TINY, "round_timeout_s=180", "min_nodes=1", "num_clients=2", "num_rounds=3"]
    overrides += [f"output_dir={place.outputs}", f"cache_dir={place.folder}/cache"]
    overrides += ["method=byol", "receive=fedema", "wire=int4"]
    run_config = f'hydra-overrides="{" ".join(overrides)}"'
    place.start("server", "flwr", "run", ".", "two-sites", "--stream", "--run-config", run_config)
    place.wait_for("server", "configure_train", 240)
    place.kill("client2")
    place.client(2)
    place.wait_for("server", f"without client 1: {GONE}", 240)
    # Without a key of its own it gets its partition once its old heartbeat is missing.
    place.wait_for("server", "partition 1 is connected again", 240)
    assert place.end("server", 200) == 0, place.all_logs()
    kept = list((place.folder / "cache" / "clients").glob("*/partition-*/round-*"))
    assert len({file.parent for file in kept}) == 2  # of one run, each node's own
    left = list((place.folder / "cache" / "clients").glob("*/partition-*/left/round-*"))
    assert len({file.parent for file in left}) == 2
    first, *_, last = place.rounds()
    (failure,) = first["failures"]
    assert (failure["partition"], failure["reason"]) == (1, GONE)
    assert [client["partition"] for client in first["clients"]] == [0]
    assert first["bytes_up"] < 6e6  # of 46 MB
    assert 1 in [client["partition"] for client in last["clients"]]
    assert last["failures"] == []


@pytest.mark.slow
def test_a_node_that_never_comes_and_a_superlink_that_is_stopped(place):
    place.superlink()
    place.client(1)
    place.server("node_wait_s=4")
    assert place.end("server", 60) == 1
    last = place.log("server").splitlines()[-1]
    assert "1 of 2 nodes are connected after waiting 4 s" in last
    assert "Traceback" not in place.log("server")

    place.server(name="again")
    place.wait_for("again", "1 of 2 nodes are connected; waiting", 240)
    place.started["superlink"].terminate()
    for name in ("again", "client1"):
        assert place.end(name, 40) == 1
        assert "failed: " in place.log(name).splitlines()[-1], place.log(name)
    assert "has been gone for 5 s" in place.log("client1").splitlines()[-1]


BAD_INPUT = {
    "unknown client": (["client", "app:client9"], "did you mean app:client"),
    "unknown module": (["client", "nowhere:client1"], "in the module 'app'"),
    "the other kind": (["client", "app:server"], "known: client, client1, client2"),
    "no attribute": (["client", "app"], "must be module:attribute"),
    "a client as server": (["server", "app:client1"], "known: server"),
    "no SuperLink": (["server", "app:server"], "no SuperLink at"),
    "no SuperLink for a node": (["client", "app:client1", "--max-wait-time=1"], "no SuperLink at"),
    "a wrong address": (["client", "app:client1", "--superlink=here"], "must be HOST:PORT"),
    "a missing certificate": (["client", "app:client1", "--root-certificates=no.crt"], "no such"),
    "a missing folder": (
        ["client", "app:client1", "--node-config", 'data-path="/nowhere"'],
        "data-path=/nowhere: is no folder",
    ),
    "an unknown node key": (
        ["client", "app:client1", "--node-config", "partition=0"],
        "partition: unknown key; known: partition-id",
    ),
    "an unknown run key": (["server", "app:server", "--run-config", "rounds=3"], "rounds: unknown"),
    "a wrong override": (["server", "app:server", "num_round=3"], "did you mean num_rounds?"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
@pytest.mark.slow
def test_bad_input_gets_one_line(case, place):
    (kind, *arguments), message = BAD_INPUT[case]
    link = (
        [] if any(a.startswith("--superlink") for a in arguments) else ["--superlink", place.link]
    )
    secure = [] if any("certificates" in a for a in arguments) else ["--insecure"]
    status, output = place.run(f"flower-{kind}-app", *arguments, *link, *secure)
    assert status != 0
    assert message in output.splitlines()[-1]
    assert "Traceback" not in output


@pytest.mark.slow
def test_an_empty_folder_and_a_port_in_use_get_one_line(place):
    empty = place.folder / "empty"
    empty.mkdir()
    node = ["flower-client-app", "app:client1", "--insecure", "--superlink", place.link]
    status, output = place.run(*node, "--node-config", f'data-path="{empty}"')
    assert (status, output.count("\n")) == (2, 1)
    assert "is empty" in output
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        status, output = place.run(*node, f"--port={port}")
    assert (status, output.count("\n")) == (2, 1)
    assert f"--port={port}: Address already in use" in output
