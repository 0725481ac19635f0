"""What lets requests in: headers from the command line, the environment, a file or the URL.

None of it is ever printed or stored: no error here repeats a value, and what holds headers keeps them out of its text.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from mlsys_bench.errors import BadInput

Headers = tuple[tuple[str, str], ...]

_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # a token of RFC 9110
_OURS = ("content-length", "transfer-encoding", "connection", "host", "upgrade")


def headers(
    given: Sequence[str] = (), *, key_variable: str | None = None, file: Path | None = None, environment: Mapping[str, str] | None = None
) -> Headers:
    """Return headers from `Name: value` lines, the variable of an API key and a file.  Raises BadInput without ever naming a value."""
    found = [_header(line, f"--header number {i}") for i, line in enumerate(given, 1)]
    if key_variable is not None:
        found.append(("Authorization", f"Bearer {_from_environment(key_variable, os.environ if environment is None else environment)}"))
    if file is not None:
        found += _from_file(file)
    names = [name.lower() for name, _ in found]
    if names.count("authorization") > 1:
        raise BadInput("Authorization is given twice: one of --header, --api-key-env and --auth-file is enough")
    return tuple(found)


def without_user(url: str) -> tuple[str, Headers]:
    """Return a URL without user and password, and the header that these become."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
    except ValueError:
        return url, ()  # no URL at all: who looks at the target says so
    if "@" not in parts.netloc:
        return url, ()
    pair, _, host = parts.netloc.rpartition("@")
    user, _, password = pair.partition(":")
    basic = base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode()
    return urlunsplit(parts._replace(netloc=host)), (("Authorization", f"Basic {basic}"),)


def _header(line: str, where: str) -> tuple[str, str]:
    name, colon, value = line.partition(":")
    name, value = name.strip(), value.strip()
    if not colon or not _NAME.fullmatch(name):
        raise BadInput(f"{where}: is written 'Name: value', like 'X-Tenant: team-a'")
    if any(ord(c) < 32 or ord(c) > 255 for c in value):
        raise BadInput(f"{where}: the value of {name} has a line break or another character that no header may have")
    if name.lower() in _OURS:
        raise BadInput(f"{where}: {name} follows from each request and cannot be set")
    return name, value


def _from_environment(variable: str, environment: Mapping[str, str]) -> str:
    key = environment.get(variable, "").strip()
    if not key:
        raise BadInput(f"--api-key-env {variable}: that variable is not set, or empty; export it first")
    return _header(f"Authorization: {key}", f"--api-key-env {variable}")[1]


def _from_file(file: Path) -> list[tuple[str, str]]:
    """Return the headers of a file: lines `Name: value`, or one token alone."""
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip() and not line.lstrip().startswith("#")]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--auth-file {file}: cannot be read: {getattr(error, 'strerror', None) or 'no text'}") from None
    if not lines:
        raise BadInput(f"--auth-file {file}: is empty; write a token, or a line like Authorization: Bearer TOKEN")
    if len(lines) == 1 and not _NAME.fullmatch(lines[0].partition(":")[0].strip()):
        lines = [f"Authorization: {lines[0].strip()}"]  # like `Bearer TOKEN`
    elif len(lines) == 1 and ":" not in lines[0]:
        lines = [f"Authorization: Bearer {lines[0].strip()}"]
    return [_header(line, f"--auth-file {file}, line {i}") for i, line in enumerate(lines, 1)]
