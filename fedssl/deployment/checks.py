"""Checks of what the two commands are given, before anything starts."""

import ast
import os
import shlex
import socket
import ssl
import sys
import tomllib
from argparse import Namespace
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from click import ClickException
from flwr.common.config import parse_config_args

from fedssl.config.compose import load_config
from fedssl.config.moved import modernize_overrides
from fedssl.deployment.superlink import SuperLinkAddress
from fedssl.errors import UserError

KINDS = {"clientapp": "ClientApp", "serverapp": "ServerApp"}


def check_app(reference: str, component: str) -> str:
    """Check a `module:attribute` against the app that the project ships.

    Args:
        component: "clientapp" or "serverapp".

    Returns:
        The attribute.

    Raises:
        UserError: not this project's module, no such attribute, or the other kind.
    """
    module, _, attribute = reference.partition(":")
    if not module or not attribute:
        raise UserError(f"{reference}: must be module:attribute, such as app:server")
    try:
        project = tomllib.loads(Path("pyproject.toml").read_text())
        shipped = project["tool"]["flwr"]["app"]["components"][component]
    except (OSError, KeyError, tomllib.TOMLDecodeError) as error:
        raise UserError(
            f"{reference}: no Flower app in {Path.cwd()}; change to the project's directory"
        ) from error
    own = shipped.partition(":")[0]
    if module != own:
        raise UserError(f"{reference}: the apps of this project are in the module {own!r}")
    known = _list_apps(Path(f"{module}.py"), reference)[component]
    if attribute not in known:
        close = get_close_matches(attribute, known, n=1)
        hint = f"did you mean {module}:{close[0]}?" if close else f"known: {', '.join(known)}"
        raise UserError(f"{reference}: {module} has no {KINDS[component]} {attribute!r}; {hint}")
    if component == "serverapp" and reference != shipped:
        raise UserError(f"{reference}: pyproject.toml ships {shipped}; name the other one there")
    return attribute


def _list_apps(file: Path, reference: str) -> dict[str, list[str]]:
    """List the names of a module's apps by component, from its text: importing it takes seconds."""
    try:
        body = ast.parse(file.read_text()).body
    except (OSError, SyntaxError) as error:
        raise UserError(f"{reference}: {file} can't be read ({error})") from error
    found: dict[str, list[str]] = {component: [] for component in KINDS}
    for node in body:
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
            continue
        maker = ast.unparse(node.value.func).rpartition(".")[2].replace("_", "").lower()
        names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        for component in KINDS:  # ServerApp(), make_client_app(...)
            if maker.endswith(component):
                found[component] += names
    return found


def check_run_config(text: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Check a run configuration and add Hydra overrides to it.

    Raises:
        UserError: not readable, an unknown key, or a wrong Hydra override.
    """
    values = _read_pairs("--run-config", text, ("hydra-overrides",))
    given = str(values.get("hydra-overrides", ""))
    try:
        joined = [*shlex.split(given), *overrides]
    except ValueError as error:
        raise UserError(f"hydra-overrides={given}: {error}; close the quotes") from error
    overrides, notices = modernize_overrides(joined)
    for notice in notices:
        print(notice, file=sys.stderr)
    load_config("config", overrides, federated=True)
    return {"hydra-overrides": shlex.join(overrides)}


def check_node_config(text: str) -> dict[str, Any]:
    """Check a node configuration, and the folder of images if it names one.

    Raises:
        UserError: not readable, an unknown key, a wrong value or folder.
    """
    flag = "--node-config"
    folders, files = ("data-path", "labels-path"), ("signing-key", "nodes-file")
    values = _read_pairs(flag, text, ("partition-id", "num-partitions", *folders, *files))
    for key, value in values.items():
        if key not in (*folders, *files) and (type(value) is not int or value < 0):
            raise UserError(f"{flag}: {key}={value}: must be a whole number, at least 0")
    for key in values.keys() & set(folders):
        values[key] = _check_folder(f"{flag}: {key}", str(values[key]))
    for key in values.keys() & set(files):
        values[key] = str(check_file(f"{flag}: {key}", Path(str(values[key]))).absolute())
    return values


def _check_folder(key: str, given: str) -> str:
    """Make sure that a folder holds something; give its absolute path."""
    try:
        folder = Path(os.path.realpath(os.path.expanduser(given)))
        wrong = "is no folder" if not folder.is_dir() else None
        wrong = wrong or (None if any(folder.iterdir()) else "is empty")
    except (OSError, ValueError) as error:  # a name with a NUL, too long, or not ours to read
        raise UserError(f"{key}={given}: can't be read ({error}); check the path") from error
    if wrong:
        raise UserError(f"{key}={folder}: {wrong}; give a folder of images")
    return str(folder)


def _read_pairs(flag: str, text: str, known: Sequence[str]) -> dict[str, Any]:
    """Read pairs as Flower does, key=1 key="text", and refuse unknown keys."""
    try:
        values = parse_config_args([text])
    except (ClickException, OSError, ValueError) as error:
        reason = str(error).partition(".")[0]
        raise UserError(f'{flag}: {text}: {reason}; write key=1 key="text"') from error
    if text.strip() and not values:
        raise UserError(f'{flag}: {text}: no key=value pair; write key=1 key="text"')
    for key in values:
        if key not in known:
            close = get_close_matches(key, known, n=1) or known
            raise UserError(f"{flag}: {key}: unknown key; known: {', '.join(close)}")
    return values


def free_port() -> int:
    """Find a TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_port(port: int) -> int:
    """Make sure that a TCP port is free.

    Raises:
        UserError: it is not.
    """
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--port={port}: {reason}; leave it out for a free one") from error
    return port


def check_link(given: Namespace) -> SuperLinkAddress:
    """Check how the SuperLink is to be reached."""
    host, _, port = given.superlink.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--superlink={given.superlink}: must be HOST:PORT, such as 10.0.0.5:8000")
    if given.insecure and given.root_certificates:
        raise UserError("--insecure and --root-certificates exclude each other; drop one")
    if given.max_wait_time < 0:
        raise UserError(f"--max-wait-time={given.max_wait_time:g}: must be 0 or more seconds")
    certificates = given.root_certificates
    if certificates:
        certificates = check_file("--root-certificates", certificates)
        try:
            ssl.create_default_context(cafile=certificates)
        except OSError as error:
            raise UserError(
                f"--root-certificates={certificates}: no certificate in PEM form"
            ) from error
    certificate = getattr(given, "certificate", None)
    if certificate:
        if given.insecure:
            raise UserError("--insecure and --certificate exclude each other; drop one")
        certificate = check_file("--certificate", certificate)
        try:
            ssl.create_default_context().load_cert_chain(certificate, password="")
        except OSError as error:
            raise UserError(
                f"--certificate={certificate}: must hold a certificate and its key, in PEM form "
                "and without a password"
            ) from error
    return SuperLinkAddress(given.superlink, given.insecure, certificates, certificate)


def check_file(flag: str, file: Path) -> Path:
    """Make sure that a file is there and ours to read; make its path absolute."""
    file = file.expanduser()
    try:
        if not file.is_file():
            raise UserError(f"{flag}={file}: no such file")
        file.open("rb").close()
        return file.resolve()
    except OSError as error:
        raise UserError(f"{flag}={file}: can't be read ({error.strerror})") from error
