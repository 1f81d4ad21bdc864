"""Make the certificates and keys of an encrypted federation with known nodes, and its door.

    python -m scripts.certificates --hosts superlink.example.org 10.0.0.5 --nodes 2
    python -m scripts.certificates --names hospital-a hospital-b
    python -m scripts.certificates --remove hospital-b

writes into certificates/: a private certificate authority (ca.crt, ca.key), a
certificate for the given names and this machine (server.crt, server.key), for each
node a key pair (node1, node1.pub) and a TLS client certificate with its key
(node1.pem; node1.crt is the certificate alone), nodes.yaml (which node holds which
partition) and nginx.conf (the door). What is there already is kept, so that nodes
can be added later; nodes.yaml and nginx.conf are written anew each time.

A site needs ca.crt, node1 and node1.pem; the rest stays. A site that made its own
key sends its public half: save it as certificates/NAME.pub, then add --names NAME.
"""

import argparse
import sys
from pathlib import Path

from fedssl.deployment.certificates import make_certificates
from fedssl.deployment.door import DoorSettings, write_door
from fedssl.deployment.members import remove_nodes
from fedssl.errors import UserError
from fedssl.terminal import print_line


def main() -> None:
    """Read the command line, make the files, say what is next."""
    given = _parser().parse_args()
    try:
        for flag, value in (("nodes", given.nodes), ("days", given.days)):
            if value is not None and not 1 <= value <= 10_000:
                raise UserError(f"--{flag}={value}: must be from 1 to 10000")
        if given.remove:
            remove_nodes(given.out, given.remove)
        numbered = [f"node{number}" for number in range(1, (given.nodes or 0) + 1)]
        names = [*numbered, *given.names]
        if not names and not given.remove and not (given.out / "nodes.yaml").exists():
            names = ["node1", "node2"]
        made = make_certificates(given.out, given.hosts, names, given.days)
        write_door(
            given.out,
            port=given.port,
            superlink_port=given.superlink_port,
            max_body_mb=given.max_body_mb,
        )
    except UserError as error:
        print_line(f"error: {error}", "error", sys.stderr)
        sys.exit(2)
    shown = ", ".join(file.name for file in made) or "nothing, all of it was there"
    print(f"Made in {given.out}: {shown}; nodes.yaml and nginx.conf are up to date")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, usual = parser.add_argument, DoorSettings()
    add("--hosts", nargs="+", default=[], help="names and addresses of the server")
    add("--nodes", type=int, metavar="N", help="nodes node1 to nodeN (2 in a new folder)")
    add("--names", nargs="+", default=[], metavar="NAME", help="nodes with names of your own")
    add("--remove", nargs="+", default=[], metavar="NAME", help="nodes to throw out")
    add("--days", type=int, default=365, help="validity (default: %(default)s)")
    add("--out", type=Path, default=Path("certificates"), help="%(default)s")
    add("--port", type=int, help=f"of the door (default: {usual.port}, then as it was)")
    add("--superlink-port", type=int, help=f"default: {usual.superlink_port}, then as it was")
    add("--max-body-mb", type=int, help=f"of a request (default: {usual.max_body_mb})")
    return parser


if __name__ == "__main__":
    main()
