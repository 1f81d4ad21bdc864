"""How the processes of a federation end, come back and keep to themselves, on loopback."""

import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT
from deployment.place import Place

from benchmarks.performance.simulation import descendants
from fedssl.deployment.control import Control, FollowedRun
from fedssl.deployment.superlink import SuperLinkAddress

pytestmark = pytest.mark.slow
PATIENT = ("--max-wait-time", "60")
LONG = ["num_clients=2", "num_rounds=40"]  # killed long before its end


class Script(Place):
    """Processes as a script without job control starts them: Ctrl-C means nothing to them."""

    def start(self, name, *command):
        with (self.folder / f"{name}.log").open("a") as log:
            self.started[name] = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.env,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
            )
        return self.started[name]

    def end_of_run(self, *overrides):
        """Run flower-server-app to its end; give its status."""
        self.server(*overrides, name="run")
        return self.end("run", 240)


@pytest.fixture
def place(tmp_path):
    made = Script(tmp_path)
    yield made
    made.stop_all()


def wait_until(true, timeout_s, place):
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"{place.left_over()}\n{place.all_logs()}"
        time.sleep(0.2)


def write_app(folder, text):
    """Write an app with the name and version of this project's."""
    folder.mkdir()
    (folder / "app.py").write_text(text)
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "federated-simclr"\nversion = "1.1.0"\ndescription = "x"\n'
        'license = "Apache-2.0"\n'
        '[tool.flwr.app]\npublisher = "federated-simclr"\n'
        '[tool.flwr.app.components]\nserverapp = "app:server"\nclientapp = "app:client"\n'
    )
    return folder


STRANGE = """
from pathlib import Path
Path({mark!r}).touch()
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client, server = ClientApp(), ServerApp()

@client.query()
def answer(message, context):
    Path({mark!r} + "-client").touch()
    return Message(RecordDict(), reply_to=message)

@server.main()
def main(grid, context):
    asked = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
    for reply in grid.send_and_receive(asked, timeout=60):
        if reply.has_error():
            error = reply.error
            raise RuntimeError(f"{{len(asked)}} asked, {{error.code}}: {{error.reason}}")
"""


def test_a_node_refuses_another_app_and_lives_on(place):
    """Of the same name and version; with --any-app it runs."""
    place.superlink()
    place.client(1)
    place.wait_for("client1", "SuperNode ID", 60)
    mark = place.folder / "it-ran"
    strange = write_app(place.folder / "strange", STRANGE.format(mark=str(mark)))
    link = SuperLinkAddress(place.link, True, None)
    control = Control(link)
    with pytest.raises(RuntimeError, match=r"1 asked, 7: .*this site installed"):
        FollowedRun(control, link, control.start_run(strange, {})).follow(10)
    assert "the bundle of the app 'federated-simclr/federated-simclr' '1.1.0' has the digest" in (
        place.log("client1")
    )
    assert not Path(f"{mark}-client").exists()

    place.env["FLWR_HOME"] = str(place.folder / "node")
    place.client(2)
    assert place.end_of_run("num_rounds=1", "num_clients=2") == 0, place.all_logs()
    unpacked = [place.folder / "node", *(place.folder / "node").rglob("app.py")]
    assert len(unpacked) > 1
    assert not any(stat.S_IMODE(path.stat().st_mode) & 0o077 for path in unpacked)

    for name in ("client1", "client2"):
        place.started[name].terminate()
        assert place.end(name, 20) == 130
    place.client(1, "--any-app")
    wait_until(lambda: place.log("client1").count("SuperNode ID") == 2, 60, place)
    FollowedRun(control, link, control.start_run(strange, {})).follow(10)
    assert Path(f"{mark}-client").exists()


def test_the_processes_of_a_node_die_with_its_command(place):
    place.superlink()
    place.client(1)
    place.client(2)
    place.server(*LONG)
    place.wait_for("server", "configure_train", 120)
    launcher = place.started["client1"].pid
    wait_until(lambda: len(descendants(launcher)) >= 3, 30, place)  # supernode, superexec, client
    children = descendants(launcher)
    os.kill(launcher, signal.SIGKILL)
    place.started["client1"].wait()
    wait_until(lambda: not any(is_running(pid) for pid in children), 8, place)
    place.kill("server")


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_sigterm_ends_everything_and_stops_the_run(place):
    place.superlink()
    place.client(1)
    place.client(2)
    place.server(*LONG)
    place.wait_for("server", "configure_train", 120)
    listening = [address for pid in own_processes(place) for address in listeners(pid)]
    assert len(listening) >= 3  # the SuperLink and the two nodes
    assert set(listening) == {"0100007F"}, listening  # 127.0.0.1
    place.started["server"].terminate()
    assert place.end("server", 20) == 130
    assert "stopped the run" in place.log("server")
    for name in ("client1", "client2"):
        place.started[name].terminate()
        assert place.end(name, 20) == 130
    place.started["superlink"].terminate()
    assert place.end("superlink", 20) in (0, -signal.SIGTERM)  # Uvicorn passes the signal on
    wait_until(lambda: not place.left_over(), 30, place)


def own_processes(place):
    return [pid for each in place.started.values() for pid in [each.pid, *descendants(each.pid)]]


def listeners(pid):
    """List the IPv4 addresses, as the kernel writes them, on which a process listens."""
    links = [link for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
    sockets = {os.readlink(link).partition("[")[2].rstrip("]") for link in links}
    tables = (Path(f"/proc/{pid}/net/{name}").read_text() for name in ("tcp", "tcp6"))
    rows = [row.split() for table in tables for row in table.splitlines()[1:]]
    listen = "0A"
    return [row[1].partition(":")[0] for row in rows if row[3] == listen and row[9] in sockets]


def test_nodes_find_a_superlink_that_was_killed_and_the_run_goes_on(place):
    place.superlink()
    for number in (1, 2):
        place.client(number, *PATIENT)
    place.server("num_clients=2", "num_rounds=2", *PATIENT)
    place.wait_for("server", "round 1:", 180)
    place.wait_for("server", "configure_train: Sampled 2", 30)
    place.kill("superlink")
    time.sleep(5)
    place.superlink()
    assert place.end("server", 90) == 1
    last = place.log("server").splitlines()[-1]
    assert "was lost when the SuperLink" in last, last
    assert "resume=latest" in last, last
    for name in ("client1", "client2"):
        wait_until(lambda name=name: place.log(name).count("SuperNode ID") >= 2, 60, place)
        assert place.started[name].poll() is None
    assert place.end_of_run("resume=latest", "num_clients=2", "num_rounds=2", *PATIENT) == 0, (
        place.all_logs()
    )
    assert [row["round"] for row in place.rounds()] == [1, 2]


def test_a_superlink_that_stays_away_ends_the_commands_with_the_reason(place):
    place.superlink()
    place.client(1)
    place.client(2)
    place.server(*LONG)
    place.wait_for("server", "configure_train", 120)
    place.kill("superlink")
    for name in ("server", "client1", "client2"):
        assert place.end(name, 40) == 1
        assert "has been gone for 5 s" in place.log(name).splitlines()[-1]
