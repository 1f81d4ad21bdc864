"""Environment variables that Flower and Ray read when they are imported. Import me first."""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the project

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else a warning per run


def _protect_ray() -> Iterator[str]:
    """Let Ray listen to this machine alone, and to those alone who have this process's token.

    Yields:
        The variables that were set here, rather than by the user.
    """
    variables = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # on Linux, too: only on loopback
    if not RAY_AUTHENTICATION & os.environ.keys():
        variables |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    for name, value in variables.items():
        if name not in os.environ:
            os.environ[name] = value
            yield name


RAY_AUTHENTICATION = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
RAY_PROTECTION = tuple(_protect_ray())  # to be taken back before a cluster is joined
