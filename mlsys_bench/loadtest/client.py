"""How the client itself behaves: its patience, its second attempts, whom it trusts, through which proxy it goes."""

from __future__ import annotations

import base64
import random
import ssl
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mlsys_bench import units
from mlsys_bench.errors import BadInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """A share of the requests that the client gives up on purpose, as people who close a window do.  Which ones follows from the seed."""

    share: float
    after_s: tuple[float, float] | None = None  # of the send, drawn evenly in between
    after_events: tuple[int, int] | None = None  # so many events of the stream, drawn evenly in between

    def draw(self, seed: int, index: int) -> tuple[int | None, float | None]:
        """Return the events and the seconds after which a request is given up; (None, None) for the others."""
        rng = random.Random(f"cancel {seed} {index}")
        if rng.random() >= self.share:
            return None, None
        events = None if self.after_events is None else rng.randint(*self.after_events)
        return events, None if self.after_s is None else rng.uniform(*self.after_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """The behaviour of a client, beyond the requests it sends."""

    connect_timeout_s: float | None = None  # None: only the timeout of the whole request counts
    first_byte_timeout_s: float | None = None
    retries: int = 0  # of a request that was refused, or whose connection failed before an answer began
    cancel: Cancel | None = None
    keep_alive: bool = True
    ca_file: str | None = None
    insecure: bool = False
    proxy: str | None = field(default=None, repr=False)  # URL, maybe with a password; "none": none; None: as the environment says


@dataclass(frozen=True, slots=True, kw_only=True)
class Proxy:
    """An HTTP proxy as a URL names it."""

    host: str
    port: int
    credentials: str | None = field(default=None, repr=False)  # user:password


def checked(
    *,
    connect_timeout: str | None = None,
    first_byte_timeout: str | None = None,
    retries: int = 0,
    cancel: str | None = None,
    keep_alive: bool = True,
    ca_file: Path | None = None,
    insecure: bool = False,
    proxy: str | None = None,
) -> Client:
    """Return a client from options as typed.  Raises BadInput naming the option."""
    if retries < 0:
        raise BadInput(f"--retries {retries}: cannot be negative; 0 is none")
    if ca_file is not None and not ca_file.is_file():
        raise BadInput(f"--ca-file {ca_file}: is no file; give certificates in PEM")
    if proxy is not None and proxy != "none":
        _parsed(proxy, "--proxy")
    return Client(
        connect_timeout_s=_seconds("--connect-timeout", connect_timeout),
        first_byte_timeout_s=_seconds("--first-byte-timeout", first_byte_timeout),
        retries=retries,
        cancel=None if cancel is None else parse_cancel(cancel),
        keep_alive=keep_alive,
        ca_file=None if ca_file is None else str(ca_file.resolve()),
        insecure=insecure,
        proxy=proxy,
    )


def parse_cancel(text: str) -> Cancel:
    """Return what '10%@2s', '10%@1s..5s', '5%@20' or '5%@1..40' (events of the stream) say.  Raises BadInput."""
    share_text, at, rest = text.partition("@")
    low, _, high = rest.partition("..")
    try:
        share = units.plain(share_text.removesuffix("%")) / (100 if share_text.endswith("%") else 1)
        if not at or not 0 < share <= 1:
            raise ValueError
        if low.isdecimal():
            events = (int(low), int(high or low))
            if not 1 <= events[0] <= events[1]:
                raise ValueError
            return Cancel(share=share, after_events=events)
        seconds = (units.seconds(low), units.seconds(high or low))
        if not 0 <= seconds[0] <= seconds[1]:
            raise ValueError
    except (ValueError, BadInput):
        raise BadInput(f"--cancel {text}: write SHARE@AFTER, such as 10%@2s, 10%@1s..5s, or 5%@20 for 20 events of the stream") from None
    return Cancel(share=share, after_s=seconds)


def tls_context(client: Client) -> ssl.SSLContext:
    """Return whom to trust.  Raises BadInput for a file that holds no certificates."""
    try:
        context = ssl.create_default_context(cafile=client.ca_file)
    except (OSError, ssl.SSLError) as error:
        raise BadInput(f"--ca-file {client.ca_file}: holds no certificates in PEM: {error}") from error
    if client.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def proxy_for(client: Client, scheme: str, host: str) -> Proxy | None:
    """Return the proxy on the way to a host: the one asked for, else that of HTTP_PROXY, HTTPS_PROXY and NO_PROXY.  Raises BadInput.

    A host that is this machine is never reached through the environment's proxy.
    """
    if client.proxy == "none":
        return None
    if client.proxy is not None:
        return _parsed(client.proxy, "--proxy")
    found = urllib.request.getproxies()
    url = found.get(scheme) or found.get("all")
    if not url or host in ("localhost", "::1") or host.startswith("127.") or urllib.request.proxy_bypass(host):
        return None
    return _parsed(url, f"{scheme.upper()}_PROXY")


def authority(host: str, port: int) -> str:
    """Return HOST:PORT as URLs and Host headers write it: an IPv6 address in brackets (RFC 3986, section 3.2.2)."""
    return f"{f'[{host}]' if ':' in host else host}:{port}"


def authorization(proxy: Proxy | None) -> list[tuple[str, str]]:
    """Return the header that a proxy with a password wants."""
    if proxy is None or not proxy.credentials:
        return []
    return [("Proxy-Authorization", f"Basic {base64.b64encode(proxy.credentials.encode()).decode()}")]


def _parsed(url: str, where: str) -> Proxy:
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port or 80
    except ValueError:
        parts, port = urlsplit(""), 0
    if parts.scheme != "http" or not parts.hostname:  # the URL may hold a password: it is not repeated
        raise BadInput(f"{where}: is no HTTP proxy; write it like http://proxy:3128, or --proxy none to go without")
    user = f"{unquote(parts.username)}:{unquote(parts.password or '')}" if parts.username else None
    return Proxy(host=parts.hostname, port=port, credentials=user)


def _seconds(option: str, text: str | None) -> float | None:
    if text is None:
        return None
    seconds = units.seconds(text, option)
    if seconds <= 0:
        raise BadInput(f"{option} {text}: must be above zero")
    return seconds
