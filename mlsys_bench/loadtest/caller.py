"""Plain requests of the standard library to a target, one at a time: for looking at it before a run."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mlsys_bench.errors import BadInput, MeasurementFailed
from mlsys_bench.loadtest.client import Proxy, authority, authorization

_BUSY_TRIES = 3
_CONNECT_S = 10.0  # longest wait for a connection and its TLS


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What came back."""

    method: str
    path: str
    status: int
    headers: Mapping[str, str]  # names in lower case
    data: bytes

    @property
    def kind(self) -> str:
        """The content type, without parameters."""
        return self.headers.get("content-type", "").split(";")[0].strip() or "nothing"

    def json(self) -> Any:
        """Return the JSON it carries, or None where it is none."""
        try:
            return json.loads(self.data)
        except (ValueError, RecursionError):
            return None

    def __str__(self) -> str:
        return f"{self.method} {shown(self.path)} answers {self.status} {self.kind}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """How a target is called.  `headers` may hold secrets: they stay out of the text of this object, and so of every error."""

    url: str
    scheme: Literal["http", "https"]
    host: str
    port: int
    headers: tuple[tuple[str, str], ...] = ()
    timeout_s: float
    tls: ssl.SSLContext | None = None
    proxy: Proxy | None = None

    def __repr__(self) -> str:
        return f"Caller({self.url})"

    def call(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        content_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Return what came back.  Raises BadInput when no HTTP comes back."""
        said = {"User-Agent": "mlsys-loadtest", **({"Content-Type": content_type} if body is not None else {}), **(headers or {})}
        given = {name.lower() for name, _ in self.headers}
        connection = self._connection()
        self._connect(connection)
        try:
            whole = f"http://{authority(self.host, self.port)}{path}"  # what a proxy wants to hear
            connection.putrequest(method, whole if self.proxy and self.scheme == "http" else path, skip_accept_encoding=True)
            for name, value in authorization(self.proxy) if self.scheme == "http" else ():
                connection.putheader(name, value)
            for name, value in [*((n, v) for n, v in said.items() if n.lower() not in given), *self.headers]:
                connection.putheader(name, value)
            if body is not None:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Reply(method=method, path=path, status=response.status, headers=found, data=response.read())
        except TimeoutError as error:
            raise BadInput(f"{self.url}: {method} {shown(path)} was not answered within {self.timeout_s:g} s") from error
        except (http.client.HTTPException, OSError) as error:
            raise BadInput(f"{self.url}: {method} {shown(path)} gave no HTTP answer: {error!r}") from error
        finally:
            connection.close()

    def _connect(self, connection: http.client.HTTPConnection) -> None:
        """Open it: a server that is silent to a TLS greeting is found out long before the patience of a request is over."""
        connection.timeout = min(self.timeout_s, _CONNECT_S)
        try:
            connection.connect()
        except ssl.SSLCertVerificationError as error:
            raise BadInput(
                f"{self.url}: its TLS certificate is refused: {error.verify_message}; renew it, trust its authority (--ca-file) "
                "or anybody (--insecure)"
            ) from error
        except TimeoutError as error:
            raise BadInput(f"{self.url}: no connection within {connection.timeout:g} s{self._plain()}") from error
        except (http.client.HTTPException, OSError) as error:
            wrong = self._plain() if isinstance(error, ssl.SSLError) else ""
            raise BadInput(f"{self.url}: cannot be connected to: {error.strerror or error}{wrong}" if isinstance(error, OSError) else
                           f"{self.url}: cannot be connected to: {error!r}") from error  # fmt: skip
        connection.sock.settimeout(self.timeout_s)

    def _plain(self) -> str:
        return "; does it speak TLS? Plain HTTP is http://" if self.scheme == "https" else ""

    def patiently(self, method: str, path: str, body: bytes, content_type: str, headers: Mapping[str, str]) -> Reply:
        """Ask again when the server fails or is busy: one bad answer in a hundred must not end the run before it starts."""
        for _ in range(_BUSY_TRIES):
            reply = self.call(method, path, body, content_type, headers)
            if reply.status not in (429, 503) and reply.status < 500:
                break
        return reply

    def checked(self, reply: Reply) -> Any:
        """Return the JSON object or list of an answer of status 200.  Raises BadInput naming what came instead."""
        document = reply.json()
        self.refuse(reply)
        if document is None:
            raise BadInput(f"{self.url}: {reply}, not JSON: is this an OpenAI-compatible server?")
        if not isinstance(document, dict):
            raise BadInput(f"{self.url}: {reply}, but no JSON object: is this an OpenAI-compatible server?")
        return document

    def refuse(self, reply: Reply) -> None:
        """Raise BadInput, or MeasurementFailed for a server in trouble, unless all is well."""
        document = reply.json()
        what = f"{self.url}: {reply}"
        if reply.status in (401, 403):
            raise BadInput(f"{what}: the server wants an API key, or another one; see --header, --api-key-env and --auth-file")
        if reply.status != 200 and document is None:
            raise BadInput(f"{what}, not JSON: is this an OpenAI-compatible server?")
        if reply.status == 404:
            raise BadInput(f"{what}: there is no such endpoint or model; try another --endpoint or --model")
        if reply.status in (429, 503) or reply.status >= 500:
            raise MeasurementFailed(f"{what} to a single probe: {message(document)}")
        if reply.status != 200:
            raise BadInput(f"{what}: {message(document)}")

    def _connection(self) -> http.client.HTTPConnection:
        host, port = (self.proxy.host, self.proxy.port) if self.proxy else (self.host, self.port)
        if self.scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=self.timeout_s)
        connection = http.client.HTTPSConnection(host, port, timeout=self.timeout_s, context=self.tls)
        if self.proxy:
            connection.set_tunnel(self.host, self.port, dict(authorization(self.proxy)))
        return connection


def shown(url: str) -> str:
    """Return a URL or path as it may be printed and stored: without user and password, and without what some APIs take their key in."""
    before = url.partition("?")[0]
    scheme, mark, rest = before.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{mark}{host.rpartition('@')[2]}{slash}{path}" if mark else before


def message(document: Any) -> str:
    """Return what an error says, whichever way it is written."""
    if not isinstance(document, dict):
        return str(document)[:200]
    error = document.get("error", document.get("detail", document))
    return str(error.get("message", error) if isinstance(error, dict) else error)[:200]
