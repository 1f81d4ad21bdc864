"""Environment variables that Flower and Ray read when they are imported. Import me first."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the project

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else a warning per run
