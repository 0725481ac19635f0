"""What lets requests in comes from wherever a person keeps it, and goes nowhere but to the server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mlsys_bench import loadtest
from mlsys_bench.errors import BadInput
from mlsys_bench.loadtest import auth, job
from mlsys_bench.loadtest.caller import Caller, shown
from tests import loadtest_apis as apis

SECRET = "s3cr3t-0f-the-h0use"


def test_headers_come_from_lines_the_environment_and_files(tmp_path: Path) -> None:
    assert auth.headers(["X-Team: a", "X-Time:12:30"]) == (("X-Team", "a"), ("X-Time", "12:30"))
    assert auth.headers(key_variable="KEY", environment={"KEY": f" {SECRET}\n"}) == (("Authorization", f"Bearer {SECRET}"),)
    for text in (SECRET, f"Bearer {SECRET}", f"Authorization: Bearer {SECRET}", f"# mine\nAuthorization: Bearer {SECRET}\n\n"):
        (tmp_path / "auth").write_text(text)
        assert auth.headers(file=tmp_path / "auth") == (("Authorization", f"Bearer {SECRET}"),), text
    (tmp_path / "auth").write_text(f"X-Api-Key: {SECRET}\nX-Team: a\n")
    assert auth.headers(file=tmp_path / "auth") == (("X-Api-Key", SECRET), ("X-Team", "a"))


def test_user_and_password_of_a_url_become_a_header() -> None:
    """RFC 7617's own example: Aladdin, open sesame."""
    url, headers = auth.without_user("https://Aladdin:open%20sesame@example.test:8443/v1?x=1")
    assert url == "https://example.test:8443/v1?x=1"
    assert headers == (("Authorization", "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="),)
    assert auth.without_user("127.0.0.1:8000") == ("127.0.0.1:8000", ())
    assert auth.without_user("http://[::1") == ("http://[::1", ())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"given": [SECRET]}, "header number 1: is written"),
        ({"given": ["X-Team: a", f"Bad Name: {SECRET}"]}, "header number 2"),
        ({"given": [f"X-Key: {SECRET}\r\nX-More: 1"]}, "line break"),
        ({"given": [f"Content-Length: {SECRET}"]}, "follows from each request"),
        ({"key_variable": "NOBODY", "environment": {}}, "NOBODY"),
        ({"given": [f"Authorization: {SECRET}"], "key_variable": "K", "environment": {"K": SECRET}}, "twice"),
        ({"file": Path("/nowhere/auth")}, "cannot be read"),
    ],
)
def test_what_cannot_be_a_header_is_refused_without_a_word_of_its_value(given: dict[str, object], says: str) -> None:
    with pytest.raises(BadInput, match=says) as caught:
        auth.headers(**given)  # type: ignore[arg-type]
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "printed"),
    [
        (f"http://me:{SECRET}@host:1/v1?key={SECRET}", "http://host:1/v1"),
        (f"/openai/chat/completions?api-key={SECRET}", "/openai/chat/completions"),
        ("http://host", "http://host"),
        ("host:8000/v1", "host:8000/v1"),
    ],
)
def test_a_url_is_printed_without_what_opens_doors(url: str, printed: str) -> None:
    assert shown(url) == printed


def test_no_object_that_holds_headers_shows_them() -> None:
    caller = Caller(url="http://x", scheme="http", host="x", port=1, headers=(("Authorization", SECRET),), timeout_s=1.0)
    options = loadtest.Options(url="http://x", qps=1.0, headers=(("Authorization", SECRET),), api_key=SECRET)
    assert SECRET not in f"{caller!r} {caller} {options!r} {options}"
    assert "repr=False" in Path(job.__file__).read_text()


def test_the_probe_sends_the_headers_and_an_error_does_not_repeat_them() -> None:
    class Closed(apis.ChatOnly):
        def answer(self, method: str, path: str, body: bytes) -> apis.Answer:
            return apis.as_json({"error": {"message": "no entry"}}, 403)

    with apis.serving(Closed()) as server:
        options = loadtest.Options(url=server.url, qps=5.0, headers=(("X-Api-Key", SECRET),))
        with pytest.raises(BadInput, match="wants an API key") as caught:
            loadtest.run(options)
        (_, _, headers, _) = server.seen[0]
    assert headers["x-api-key"] == SECRET
    assert SECRET not in str(caught.value)


RUN = """
import sys
from pathlib import Path
from mlsys_bench import hardware, loadtest, record
from mlsys_bench.loadtest import auth
folder = Path(sys.argv[2])
headers = auth.headers(["X-Own: " + Path(sys.argv[3]).read_text()], key_variable="OWN_KEY")
asked = loadtest.Options(url=sys.argv[1], qps=30.0, arrivals="constant", duration_s=0.7, warmup_s=0.0, headers=headers,
                         requests_file=folder / "r.parquet")
found, requests = loadtest.run(asked, on_note=print)
record.write(folder / "r.json", found, hardware.machine())
print(found, requests.requests[0], asked)
url = sys.argv[1].replace("http://", "http://me:" + Path(sys.argv[3]).read_text() + "@") + "/nowhere?key=" + Path(sys.argv[3]).read_text()
raise SystemExit(loadtest.run(loadtest.Options(url=url, endpoint="chat", qps=30.0, headers=headers[:1])))
"""


@pytest.mark.e2e
def test_a_secret_of_a_real_run_is_in_no_file_no_output_and_no_error(tmp_path: Path) -> None:
    """Every file the run leaves, its temporary folder included, and all it prints; the server did get it with every request."""
    import os

    folder, temporary, key = tmp_path / "out", tmp_path / "tmp", tmp_path / "key"
    folder.mkdir()
    temporary.mkdir()
    key.write_text(SECRET)
    with apis.serving(apis.ChatOnly()) as server:
        done = subprocess.run(
            [sys.executable, "-c", RUN, server.url, str(folder), str(key)],
            env={**os.environ, "OWN_KEY": SECRET + "-too", "TMPDIR": str(temporary)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        seen = [headers for _, path, headers, body in server.seen if path == "/v1/chat/completions" and json.loads(body).get("stream")]
    assert "found chat at /v1/chat/completions, model tiny, streamed" in done.stdout, done.stderr
    assert len(seen) == 21
    assert {(h["x-own"], h["authorization"]) for h in seen} == {(SECRET, f"Bearer {SECRET}-too")}
    assert "BadInput" in done.stderr  # the second run's error, traceback and all
    files = [path for path in [*folder.rglob("*"), *temporary.rglob("*")] if path.is_file()]
    assert {path.name for path in files} >= {"r.parquet", "r.json"}
    for text in (done.stdout.encode(), done.stderr.encode(), *(path.read_bytes() for path in files)):
        assert SECRET.encode() not in text
