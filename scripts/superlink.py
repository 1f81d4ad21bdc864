"""Run the SuperLink of an encrypted federation with known nodes.

    python -m scripts.superlink

listens on this machine's loopback alone (nodes come through the door, an nginx),
registers the nodes of certificates/nodes.yaml and unregisters all others, and
accepts runs of this checkout's app only. What it knows of nodes and runs lies in
certificates/superlink.db, so that it can be stopped and started again. SIGHUP
reads nodes.yaml anew, SIGTERM ends it.
"""

import argparse
import sys
from pathlib import Path

from fedssl.deployment.guarded_superlink import serve
from fedssl.errors import UserError
from fedssl.terminal import print_line

PROJECT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--certificates",
        type=Path,
        default=Path("certificates"),
        metavar="DIR",
        help="what scripts.certificates wrote (default: %(default)s)",
    )
    parser.add_argument("--port", type=int, default=8000, help="on loopback (default: %(default)s)")
    parser.add_argument("--database", type=Path, metavar="FILE", help="default: DIR/superlink.db")
    parser.add_argument("--any-app", action="store_true", help="accept runs of other apps as well")
    given = parser.parse_args()
    try:
        project = None if given.any_app else PROJECT
        serve(given.certificates, given.port, given.database, project)
    except UserError as error:
        print_line(f"error: {error}", "error", sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
