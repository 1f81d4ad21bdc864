"""A SuperLink as the two commands see it: where it is, and whether it answers."""

import http.client
import ssl
import time
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

PROBE_TIMEOUT_S = 5.0
PROBE_EVERY_S = 2.0
PROBE = "/v1/fleet/pull-messages"  # a proxy lets it through; a GET asks for nothing
BODY_BYTES = 65536


class ConnectionRefused(Exception):
    """The SuperLink answers, but not to us; trying again is pointless."""


@dataclass(frozen=True)
class SuperLinkAddress:
    """How to reach a SuperLink.

    Attributes:
        address: HOST:PORT.
        insecure: without TLS.
        root_certificates: the authority that signed its certificate; None for the system's.
        certificate: the TLS client's certificate with its key, if it asks for one.
    """

    address: str
    insecure: bool
    root_certificates: Path | None
    certificate: Path | None = None

    @property
    def host(self) -> str:
        """The name or address, without brackets."""
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def proxy(self) -> str:
        """Say through which HTTP proxy Flower's connections go, for the end of a line; or ""."""
        url = self._proxy_url
        return f", by the proxy {hide_password(url)}" if url else ""

    @property
    def _proxy_url(self) -> str:
        """Give the URL of the HTTP proxy that leads there, as Flower's connections choose it."""
        if proxy_bypass(self.host):
            return ""
        proxies = getproxies()
        return proxies.get("http" if self.insecure else "https") or proxies.get("all") or ""

    def probe(self) -> None:
        """Ask for a sign of life: any answer but a broken server's or an orphaned proxy's.

        Raises:
            OSError: nobody answers there.
            ConnectionRefused: somebody does, but without TLS, only with TLS, with a
                certificate that is not trusted, or wants another one from us.
        """
        if self._proxy_url.startswith("https:"):
            return  # a proxy that wants TLS itself is left to Flower
        connection, target, headers = self._connection()
        try:
            connection.request("GET", target, headers=headers)
            answer = connection.getresponse()
            body = answer.read(BODY_BYTES).decode(errors="replace")
        except ssl.SSLCertVerificationError as error:
            known = self.root_certificates or "the system's certificate authorities"
            raise ConnectionRefused(
                f"its certificate is not accepted by {known} ({error.verify_message}); give the "
                "certificate authority that signed it with --root-certificates"
            ) from error
        except ssl.SSLError as error:
            reason = error.reason or str(error)
            if "CERTIFICATE" in reason or "UNKNOWN_CA" in reason:
                raise ConnectionRefused(self._wrong_certificate(reason)) from error
            raise ConnectionRefused(f"it does not speak TLS ({reason}); use --insecure") from error
        except TimeoutError:
            raise
        except (http.client.HTTPException, ConnectionResetError) as error:
            if not self.insecure:  # it goes down
                raise ConnectionResetError(f"the connection broke off ({error})") from error
            raise ConnectionRefused(
                "it closes unencrypted connections; replace --insecure by --root-certificates"
            ) from error
        finally:
            connection.close()
        if answer.status == 403:
            raise ConnectionRefused(
                self._wrong_certificate("the server's nodes.yaml does not name it, or no longer")
            )
        if answer.status >= 500:
            raise ConnectionError(f"its proxy answers {answer.status} {answer.reason}")
        if answer.status == 400 and "SSL certificate" in body:  # nginx's words
            wants = "its certificate is not accepted" if "error" in body else "none was given"
            raise ConnectionRefused(self._wrong_certificate(wants))
        if answer.status == 400 and "plain HTTP request was sent to HTTPS port" in body:
            raise ConnectionRefused(
                "it only takes encrypted connections; replace --insecure by --root-certificates"
            )

    def _connection(self) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
        """Prepare a connection, perhaps by a proxy; give what to ask it for, and with what headers.

        Unencrypted requests go to the proxy itself, encrypted ones through a tunnel.
        """
        where = (self.host, int(self.address.rpartition(":")[2]))
        url = self._proxy_url
        proxy = urlsplit(url if "://" in url else f"http://{url}")
        near = (proxy.hostname or "", proxy.port or 80) if url else where
        known = f"{unquote(proxy.username or '')}:{unquote(proxy.password or '')}".encode()
        login = {"Proxy-Authorization": f"Basic {b64encode(known).decode()}"}
        headers = login if proxy.username else {}
        if self.insecure:
            target = f"http://{self.address}{PROBE}" if url else PROBE
            return http.client.HTTPConnection(*near, timeout=PROBE_TIMEOUT_S), target, headers
        context = ssl.create_default_context(cafile=self.root_certificates)
        if self.certificate:
            context.load_cert_chain(self.certificate)
        connection = http.client.HTTPSConnection(*near, timeout=PROBE_TIMEOUT_S, context=context)
        if url:
            connection.set_tunnel(*where, headers=headers)
        return connection, PROBE, {}

    def _wrong_certificate(self, reason: str) -> str:
        if self.certificate:
            return (
                f"it does not accept the client certificate {self.certificate} ({reason}); give "
                "the one that it has for this node with --certificate"
            )
        return f"it asks for a client certificate ({reason}); give the node's with --certificate"


def hide_password(url: str) -> str:
    """Write the URL of a proxy without who uses it."""
    scheme, separator, rest = url.rpartition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def await_superlink(link: SuperLinkAddress, max_wait_s: float) -> None:
    """Wait for the SuperLink to answer.

    Raises:
        RuntimeError: it refuses, or does not answer in time.
    """
    deadline = time.monotonic() + max_wait_s
    told = False
    while True:
        try:
            return link.probe()
        except ConnectionRefused as error:
            raise RuntimeError(unreachable(link, error)) from error
        except OSError as error:
            if time.monotonic() >= deadline:
                raise RuntimeError(unreachable(link, error)) from error
        if not told:
            print(
                f"Waiting up to {max_wait_s:g} s for a SuperLink at {link.address} ...", flush=True
            )
            told = True
        time.sleep(min(PROBE_EVERY_S, max(0.1, deadline - time.monotonic())))


class Watch:
    """Looks every few seconds whether the SuperLink is still there."""

    def __init__(self, link: SuperLinkAddress, max_wait_s: float) -> None:
        self._link, self._max_wait_s = link, max_wait_s
        self._next = time.monotonic() + PROBE_EVERY_S
        self.gone_since: float | None = None  # on the monotonic clock

    def look(self) -> bool:
        """Probe, if it is time to.

        Returns:
            Whether it was, and the SuperLink has answered.

        Raises:
            RuntimeError: the SuperLink has been gone for too long.
        """
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + PROBE_EVERY_S
        try:
            self._link.probe()
        except (OSError, ConnectionRefused) as error:
            self.gone_since = self.gone_since or time.monotonic()
            if time.monotonic() - self.gone_since >= self._max_wait_s:
                raise RuntimeError(
                    f"the SuperLink at {self._link.address} has been gone for "
                    f"{self._max_wait_s:g} s ({error}); start it again, or wait longer with "
                    "--max-wait-time"
                ) from error
            return False
        self.gone_since = None
        return True


def unreachable(link: SuperLinkAddress, error: Exception) -> str:
    """Say in one line why a SuperLink is out of reach."""
    if isinstance(error, ConnectionRefused):
        return f"the SuperLink at {link.address} refuses: {error}"
    reason = getattr(error, "strerror", None) or str(error)
    return (
        f"no SuperLink at {link.address}{link.proxy} ({reason}); start one with flower-superlink, "
        "or give its address with --superlink HOST:PORT"
    )
