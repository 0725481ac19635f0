"""The parent's side of a run with a person's own Locust file: what there is to check, and what stands in for a probed target."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from urllib.parse import urlsplit

from mlsys_bench.askings import Asked
from mlsys_bench.errors import BadInput
from mlsys_bench.loadtest import Options
from mlsys_bench.loadtest.endpoints import Spec
from mlsys_bench.loadtest.target import Target
from mlsys_bench.types import RequestRecord

NAME = "locustfile"  # where an endpoint's kind stands


def check(options: Options) -> None:
    """Raise BadInput for what does not go together with users of one's own."""
    file = options.locustfile
    if file is None:
        return
    if options.users is None:
        raise BadInput(f"--locustfile {file}: its users send as they like: say how many with --users")
    if options.hosts is not None:
        raise BadInput(f"--locustfile {file}: runs on this machine only; use Locust's own --master and --worker for several")
    if options.busy_poll:
        raise BadInput(f"--locustfile {file}: its users wait as they like; leave out --busy-poll")
    if options.headers or options.api_key:
        raise BadInput(f"--locustfile {file}: its users set their own headers; leave out --header, --api-key-env and --auth-file")
    try:
        compile(file.read_bytes(), str(file), "exec")
    except OSError as error:
        raise BadInput(f"--locustfile {file}: cannot be read: {error.strerror or error}") from error
    except (SyntaxError, ValueError) as error:
        raise BadInput(f"--locustfile {file}: is no Python: {error}") from error


def target(options: Options) -> Target:
    """Return a target that was not looked at: only its users know what it speaks."""
    assert options.locustfile is not None
    url = options.url if "://" in options.url else f"http://{options.url}"
    parts = urlsplit(url)
    file = options.locustfile.resolve()
    spec = Spec(name=NAME, path=parts.path or "/", model=file.name, settings={"file": str(file), "url": url.rstrip("/")})
    return Target(
        scheme="https" if parts.scheme == "https" else "http", host=parts.hostname or "", address=parts.hostname or "",
        port=parts.port or (443 if parts.scheme == "https" else 80), path=spec.path, model=file.name, ignore_eos=False, chars_per_token=1.0,
        extra_tokens=0.0, notes=("sent by your own users: times are as Locust takes them, from each request's start",), endpoint=spec,
    )  # fmt: skip


def asked(options: Options, records: Sequence[RequestRecord]) -> Asked:
    """Return what the requests asked: nobody here knows, only what was counted."""
    assert options.locustfile is not None
    answered = [r for r in records if r.in_window and r.outcome == "ok"]
    return Asked(
        what=f"whatever the users of {options.locustfile.name} ask",
        prompt_tokens=None,
        prompt_tokens_counted=_mean(r.prompt_tokens for r in answered),
        output_tokens=None,
        output_tokens_counted=_mean(r.output_tokens for r in answered),
    )


def _mean(values: Iterable[int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
