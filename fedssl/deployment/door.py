"""The door: an nginx in front of the SuperLink, which lets through what known nodes need.

Flower serves nodes (Fleet), operators (Control) and its own processes (Runtime) on one port
and asks the last two for nothing. So the SuperLink listens on loopback, and nginx lets in the
ten Fleet requests of a registered node, from the holder of both the TLS certificate and the
key of the same node.
"""

import json
import re
from base64 import b64encode
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from cryptography import x509

from fedssl.config.roster import Member, read_roster
from fedssl.deployment.members import client_certificates
from fedssl.errors import UserError

# Not register-node and unregister-node: the operator decides who belongs.
PATHS = tuple(
    f"/v1/fleet/{name}"
    for name in (
        *("activate-node", "deactivate-node", "send-node-heartbeat"),
        *("pull-messages", "push-messages", "confirm-message-received"),
        *("get-run", "get-fab", "push-object", "pull-object"),
    )
)
MARK = "# settings: "


@dataclass(frozen=True)
class DoorSettings:
    """What the door listens on and lets through.

    Attributes:
        port: of the door, on all addresses.
        superlink_port: of the SuperLink, on loopback.
        max_body_mb: the largest request. The SuperLink keeps a whole request in memory;
            Flower cuts arrays into pieces of 5 MB.
        requests_per_s: of one node for a long time. A node polls twice a second and sends a
            model of 1460 objects within a minute.
        burst: requests beyond that which wait; the others get status 503, after which Flower
            tries again.
    """

    port: int = 8443
    superlink_port: int = 8000
    max_body_mb: int = 64
    requests_per_s: int = 100
    burst: int = 200


def write_door(folder: Path, **changes: int | None) -> DoorSettings:
    """Write nginx.conf for the nodes of nodes.yaml that have a certificate.

    Args:
        changes: settings other than those of the nginx.conf that is there; None keeps.

    Raises:
        UserError: a value out of range, or no nodes.
    """
    file = folder / "nginx.conf"
    given = {key: value for key, value in changes.items() if value is not None}
    settings = DoorSettings(**(_present_settings(file) | given))
    for port in ("port", "superlink_port"):
        if not 0 < getattr(settings, port) < 65536:
            raise UserError(f"{port}={getattr(settings, port)}: must be from 1 to 65535")
    for key in ("max_body_mb", "requests_per_s", "burst"):
        if getattr(settings, key) < 1:
            raise UserError(f"{key}={getattr(settings, key)}: must be at least 1")
    members = read_roster(folder / "nodes.yaml")
    text = _configuration(settings, _passes(members, client_certificates(folder)))
    (folder / "door").mkdir(exist_ok=True, mode=0o700)  # nginx's log, pid and temporary files
    file.write_text(text)
    return settings


def _present_settings(file: Path) -> dict[str, int]:
    lines = file.read_text().splitlines() if file.exists() else []
    found = next((line.removeprefix(MARK) for line in lines if line.startswith(MARK)), "{}")
    known = {field.name for field in fields(DoorSettings)}
    return {key: value for key, value in json.loads(found).items() if key in known}


def _passes(
    members: Iterable[Member], certificates: dict[bytes, x509.Certificate]
) -> Iterable[str]:
    """Give the lines of nginx's map from method, certificate and key to a node's name."""
    for member in members:
        if certificate := certificates.get(member.flower_key):
            serial = f"{certificate.serial_number:X}"
            serial = serial.zfill(len(serial) + len(serial) % 2)
            name = json.dumps(re.sub(r"[^\w.-]", "_", member.name, flags=re.ASCII))
            key = b64encode(member.flower_key).decode()
            yield f'"POST {serial} {key}" {name};'
            yield f'"GET {serial} " {name};'  # a sign of life, without a node's key


def _configuration(settings: DoorSettings, passes: Iterable[str]) -> str:
    locations = "\n".join(
        f'        location = {path} {{ if ($node = "") {{ return 403; }} '
        f"proxy_pass https://superlink{path}; }}"
        for path in PATHS
    )
    values = asdict(settings)
    mapped = "\n        ".join(passes)
    return (
        TEMPLATE.replace("@settings", MARK + json.dumps(values))
        .replace("@passes", mapped)
        .replace("@locations", locations)
        .replace("@superlink_port", str(settings.superlink_port))
        .replace("@port", str(settings.port))
        .replace("@body", str(settings.max_body_mb))
        .replace("@rate", str(settings.requests_per_s))
        .replace("@burst", str(settings.burst))
        .replace("@delay", str(settings.burst // 2))
    )


TEMPLATE = """\
# The door of a federation, for nginx 1.18 or newer. `python -m scripts.certificates` writes it.
#     start:   nginx -p certificates -c nginx.conf
#     reload:  nginx -p certificates -c nginx.conf -s reload
# No root is needed for a port above 1023. Log, pid and temporary files lie in certificates/door.
@settings

pid door/nginx.pid;
error_log door/error.log warn;
worker_processes 2;
worker_rlimit_nofile 4096;
events { worker_connections 1024; }

http {
    client_body_temp_path door/body;
    proxy_temp_path door/proxy;
    fastcgi_temp_path door/fastcgi;
    uwsgi_temp_path door/uwsgi;
    scgi_temp_path door/scgi;

    server_tokens off;
    default_type text/plain;
    map_hash_bucket_size 1024;
    map_hash_max_size 8192;
    map $status $is_refused { ~^[23] 0; 405 0; default 1; }  # 405: signs of life
    log_format refused '$time_iso8601 $remote_addr "$ssl_client_s_dn" "$request" $status';
    access_log door/refused.log refused if=$is_refused;

    # A node's key opens the door with the same node's certificate only.
    map "$request_method $ssl_client_serial $http_flwr_public_key" $node {
        default "";
        @passes
    }

    # Whoever has no more requests under way than may wait is slowed down and never refused.
    limit_req_zone $ssl_client_serial zone=requests:1m rate=@rater/s;
    limit_conn_zone $ssl_client_serial zone=connections:1m;
    limit_req_status 503;
    limit_conn_status 503;

    upstream superlink {
        server 127.0.0.1:@superlink_port;
        keepalive 32;
        keepalive_timeout 3s;  # the SuperLink closes after 5 s
    }

    server {
        listen @port ssl;
        ssl_certificate server.crt;
        ssl_certificate_key server.key;
        ssl_protocols TLSv1.2 TLSv1.3;
        ssl_session_tickets off;
        ssl_client_certificate ca.crt;
        ssl_verify_client on;
        ssl_verify_depth 1;

        client_max_body_size @bodym;
        client_header_timeout 10s;
        client_body_timeout 30s;  # between two pieces
        send_timeout 30s;
        reset_timedout_connection on;

        limit_req zone=requests burst=@burst delay=@delay;
        limit_conn connections 128;

        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_set_header Host localhost;
        proxy_set_header flwr-public-key $http_flwr_public_key;  # one, the one that was looked at
        proxy_ssl_verify on;
        proxy_ssl_trusted_certificate ca.crt;
        proxy_ssl_name localhost;
        proxy_ssl_protocols TLSv1.2 TLSv1.3;
        proxy_request_buffering off;
        proxy_buffering off;
        proxy_connect_timeout 5s;
        proxy_read_timeout 120s;
        proxy_next_upstream off;

        if ($request_uri != $uri) { return 404; }  # no queries, escapes, dots, double slashes
@locations
        location / { return 404; }
    }
}
"""
