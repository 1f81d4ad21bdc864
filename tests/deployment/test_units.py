"""The systemd units of deploy/: systemd reads them, and the commands know the flags."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

BIN = Path(sys.executable).parent
UNITS = sorted((ROOT / "deploy").glob("*.service"))
PROJECT = "/opt/federated-simclr"


def read(unit):
    """Read a unit as pairs of key and value, lines that go on joined."""
    text = unit.read_text().replace("\\\n", " ")
    return [tuple(line.split("=", 1)) for line in text.splitlines() if re.match(r"[A-Z]\w+=", line)]


def test_there_are_units_for_superlink_door_and_node():
    assert [unit.stem for unit in UNITS] == ["fedssl-door", "fedssl-node", "fedssl-superlink"]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not there")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_has_nothing_to_say(unit, tmp_path):
    """Beside where the programs lie, which are this test's own."""
    text = unit.read_text().replace(f"{PROJECT}/.venv/bin", str(BIN)).replace(PROJECT, str(ROOT))
    copy = tmp_path / unit.name
    copy.write_text(re.sub(r"=/usr/sbin/nginx", "=/bin/true", text))
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    said = [line for line in (done.stdout + done.stderr).splitlines() if unit.name in line]
    assert (done.returncode, said) == (0, []), done.stderr


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not there")
def test_systemd_would_find_an_unknown_setting(tmp_path):
    text = UNITS[0].read_text().replace("=/usr/sbin/nginx", "=/bin/true")
    (tmp_path / "door.service").write_text(text.replace("PrivateTmp=", "PrivateTemp="))
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / "door.service")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "PrivateTemp" in done.stderr


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_rights_are_the_least(unit):
    settings = dict(read(unit))
    assert settings["User"] == "fedssl"
    assert settings["UMask"] == "0077"
    assert settings["StateDirectoryMode"] == "0700"
    assert settings["ProtectSystem"] == "strict"
    assert settings["CapabilityBoundingSet"] == ""
    assert settings["KillSignal"] == "SIGTERM"
    for key in ("NoNewPrivileges", "PrivateTmp", "ProtectHome"):
        assert settings[key] == "yes"


@pytest.mark.parametrize("name", ["fedssl-node", "fedssl-superlink"])
def test_the_command_knows_the_flags(name):
    (line,) = (
        value for key, value in read(ROOT / "deploy" / f"{name}.service") if key == "ExecStart"
    )
    words = [word.replace(f"{PROJECT}/.venv/bin", str(BIN)) for word in shlex.split(line)]
    words = [word.replace(PROJECT, str(ROOT)) for word in words]
    flags = {word for word in words if word.startswith("--")}
    end = next(n for n, word in enumerate(words) if n and not word.startswith("-")) + 1
    done = subprocess.run([*words[:end], "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert flags
    for flag in flags:
        assert re.search(rf"(?<![\w-]){flag}(?![\w-])", done.stdout), flag
