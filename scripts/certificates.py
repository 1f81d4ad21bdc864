"""Make the certificates and keys of an encrypted federation with known nodes.

    python -m scripts.certificates --hosts superlink.example.org 10.0.0.5 --nodes 2

writes into certificates/: a private certificate authority (ca.crt, ca.key), the
SuperLink's certificate for the given names and this machine (server.crt,
server.key), and a key pair for each node (node1, node1.pub, ...). What is there
already is kept, so that nodes can be added later. Nodes need ca.crt and their
own key; ca.key and server.key stay where they are.
"""

import argparse
import sys
from pathlib import Path

from fedssl.deployment.certificates import make_certificates
from fedssl.errors import UserError
from fedssl.terminal import print_line


def main() -> None:
    """Read the command line, make the files, say what is next."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--hosts", nargs="+", default=[], help="names and addresses of the SuperLink"
    )
    parser.add_argument("--nodes", type=int, default=2, help="key pairs (default: %(default)s)")
    parser.add_argument("--days", type=int, default=365, help="validity (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("certificates"), help="%(default)s")
    given = parser.parse_args()
    try:
        for flag, value in (("nodes", given.nodes), ("days", given.days)):
            if not 1 <= value <= 10_000:
                raise UserError(f"--{flag}={value}: must be from 1 to 10000")
        made = make_certificates(given.out, given.hosts, given.nodes, given.days)
    except UserError as error:
        print_line(f"error: {error}", "error", sys.stderr)
        sys.exit(2)
    names = ", ".join(file.name for file in made) or "nothing, all of it was there"
    print(f"Made in {given.out}: {names}")


if __name__ == "__main__":
    main()
