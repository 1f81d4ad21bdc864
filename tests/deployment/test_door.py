"""The door and the guarded SuperLink, with the real nginx and real processes."""

import json
import os
import re
import stat
import sys
import time

import numpy as np
import pytest
from PIL import Image
from runs.test_encoder_file import PAGE

from benchmarks.robustness.door_attacks import ATTACKS, node_ids
from benchmarks.robustness.guarded_federation import NGINX, Caller, Federation
from fedssl.config.roster import read_roster
from fedssl.deployment.certificates import make_certificates
from fedssl.deployment.door import PATHS, DoorSettings, write_door
from fedssl.errors import UserError

TINY = ["train.local_epochs=1", "train.max_steps=2", "precision=float32", "num_cpus=1"]
PULL = "/v1/fleet/pull-messages"
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A SuperLink and its door, for all attacks."""
    made = Federation(tmp_path_factory.mktemp("guarded"))
    try:
        made.start_superlink()
        made.start_door()
        yield made
    finally:
        made.stop_all()


@needs_nginx
@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_an_attack_fails(guarded, attack):
    seen = attack.run(guarded)
    assert attack.held(seen), f"{attack.expected}\n{seen}\n{guarded.log('superlink')[-3000:]}"


@needs_nginx
@pytest.mark.slow
def test_three_sites_run_through_the_door(tmp_path):
    """The walk-through's run, each site with a folder, a key and a certificate, and masks.

    The keys of the masks are signed by the nodes' own, and checked by every other.
    """
    start_line = r"^flower-server-app app:server --insecure (dataset=.*num_clients=3)$"
    (chosen,) = re.findall(start_line, PAGE, re.MULTILINE)
    federation = Federation(tmp_path)
    keys = federation.certificates
    door = (
        "--superlink",
        f"127.0.0.1:{federation.door_port}",
        "--root-certificates",
        str(keys / "ca.crt"),
    )
    try:
        federation.start_superlink()
        federation.start_door()
        for number in range(1, 4):
            own = tmp_path / f"site{number} images"
            write_images(own, 12 + number, seed=number)
            federation.start(
                f"node{number}",
                *("flower-client-app", "app:client", *door),
                *("--certificate", f"{keys}/node{number}.pem"),
                *("--auth-supernode-private-key", f"{keys}/node{number}"),
                "--node-config",
                f'partition-id={number - 1} data-path="{own}" nodes-file="{keys}/nodes.yaml"',
            )
        inside = (
            "--superlink",
            f"127.0.0.1:{federation.port}",
            "--root-certificates",
            str(keys / "ca.crt"),
        )
        overrides = [*chosen.split(), *TINY, "num_rounds=1", f"output_dir={tmp_path}/outputs"]
        overrides.append("secure_aggregation=true")
        status, output = federation.run(
            "flower-server-app", "app:server", *inside, *overrides, timeout_s=400
        )
        assert status == 0, output + all_logs(federation)
        lines = (tmp_path / "outputs/latest/metrics.jsonl").read_text().splitlines()
        assert len(lines) == 1
        for row in map(json.loads, lines):
            assert not any("update_norm" in client for client in row["clients"])  # nobody saw it
            assert [client["num_examples"] for client in row["clients"]] == [11, 12, 13], output
            assert row["failures"] == []
        refused = (keys / "door" / "refused.log").read_text()
        assert " 503" not in refused, refused  # an honest node is never too fast
        assert " 403" not in refused, refused
        run = (tmp_path / "outputs/latest").resolve()
        for file in (run, run / "encoder.safetensors", keys / "superlink.db"):
            assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0, file
        assert federation.stop("superlink") == 0, all_logs(federation)
    finally:
        federation.stop_all()


def write_images(folder, count, seed):
    """Write unlabelled colour images, as a site would hold them."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for number in range(count):
        pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"image {number}.png")


def all_logs(federation):
    ends = (f"== {file}\n{file.read_text()[-1500:]}" for file in federation.folder.glob("*.log"))
    return "\n".join(ends)


@needs_nginx
@pytest.mark.slow
def test_a_restarted_superlink_knows_its_nodes(tmp_path):
    """Also those that were connected when it was killed, and which connect anew."""
    federation = Federation(tmp_path, ["node1", "node2"])
    keys = federation.certificates
    try:
        federation.start_superlink()
        federation.start_door()
        before = node_ids(federation)
        start_node(federation, "first")
        wait_for_status(federation, "online")
        for name in ("superlink", "first"):
            os.killpg(federation.started[name].pid, 9)
            federation.started[name].wait()
        with pytest.raises(AssertionError):
            assert Caller(federation, keys / "node1.pem").ask(PULL, method="GET") < 500
        federation.start_superlink()
        assert node_ids(federation) == before
        assert Caller(federation, keys / "node1.pem").ask(PULL, method="GET") == 405
        start_node(federation, "again")
        wait_for_status(federation, "online", timeout_s=30)
        assert federation.started["again"].poll() is None, federation.log("again")
    finally:
        federation.stop_all()


def start_node(federation, name):
    keys = federation.certificates
    federation.start(
        name,
        *("flower-client-app", "app:client1", "--root-certificates", f"{keys}/ca.crt"),
        *("--superlink", f"127.0.0.1:{federation.door_port}", "--certificate", f"{keys}/node1.pem"),
        *("--auth-supernode-private-key", f"{keys}/node1"),
    )


def wait_for_status(federation, status, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while True:
        _, output = federation.run("flwr", "supernode", "list", "inside", "--format", "json")
        if f'"{status}"' in output:
            return
        assert time.monotonic() < deadline, output + all_logs(federation)


@pytest.mark.slow
def test_the_superlink_says_in_one_line_what_is_missing(tmp_path):
    command = [sys.executable, "-m", "scripts.superlink", "--certificates"]
    federation = Federation(tmp_path, ["node1"])
    status, output = federation.run(*command, str(tmp_path / "nowhere"))
    assert (status, output.count("\n")) == (2, 1)
    assert "ca.crt: no such file; python -m scripts.certificates makes it" in output
    federation.start_superlink()
    try:
        port = str(federation.port)
        status, output = federation.run(*command, str(federation.certificates), "--port", port)
        assert (status, output.count("\n")) == (2, 1)
        assert f"--port={port}: Address already in use" in output
    finally:
        assert federation.stop("superlink") == 0, all_logs(federation)


def passes(folder):
    """Read who may pass: the names in nginx's map, by method."""
    text = (folder / "nginx.conf").read_text()
    return re.findall(r'^ +"(GET|POST) \w+ [\w+/=]*" "([\w.-]+)";$', text, re.MULTILINE)


def test_the_door_lets_through_what_stands_in_the_roster(tmp_path):
    make_certificates(tmp_path, [], ["a", "b"], days=1)
    write_door(tmp_path)
    assert passes(tmp_path) == [("POST", "a"), ("GET", "a"), ("POST", "b"), ("GET", "b")]
    assert not any("register" in path for path in PATHS)
    assert len(PATHS) == 10
    (tmp_path / "a.crt").unlink()  # a node without certificate
    write_door(tmp_path)
    assert passes(tmp_path) == [("POST", "b"), ("GET", "b")]
    assert [member.name for member in read_roster(tmp_path / "nodes.yaml")] == ["a", "b"]


def test_settings_stay_until_they_are_changed(tmp_path):
    make_certificates(tmp_path, [], ["a"], days=1)
    assert write_door(tmp_path) == DoorSettings()
    assert write_door(tmp_path, port=9443, max_body_mb=None).port == 9443
    again = write_door(tmp_path, max_body_mb=100)
    assert (again.port, again.max_body_mb) == (9443, 100)
    text = (tmp_path / "nginx.conf").read_text()
    assert "listen 9443 ssl;" in text
    assert "client_max_body_size 100m;" in text
    assert "@" not in text


@pytest.mark.parametrize("change", [{"port": 0}, {"port": 70000}, {"max_body_mb": 0}])
def test_a_wrong_setting_gets_one_line(tmp_path, change):
    make_certificates(tmp_path, [], ["a"], days=1)
    with pytest.raises(UserError, match="must be"):
        write_door(tmp_path, **change)


@needs_nginx
def test_nginx_reads_the_file(tmp_path):
    federation = Federation(tmp_path, [f"hospital-{n}" for n in range(60)])
    status, output = federation.run(
        str(NGINX), "-t", "-p", str(federation.certificates), "-c", "nginx.conf"
    )
    assert status == 0, output
    assert "warn" not in output
