"""What all subcommands share: exit codes, errors, terminal or pipe, a quick start."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from server.commands import generate
from server.commands.terminal import printable, size
from tests.cli.conftest import Polyrank, peft_folder
from tests.cli.fake_server import FakeServer, error


def test_version(polyrank: Polyrank) -> None:
    assert polyrank("version").out.startswith("polyrank 0.")
    assert json.loads(polyrank("version", "--json").out)["version"].startswith("0.")


@pytest.mark.parametrize("arguments", [["nonsense"], ["push"], ["ls", "--nonsense"], ["generate", "--seed", "x", "Hi"]])
def test_wrong_usage_is_2(polyrank: Polyrank, arguments: list[str]) -> None:
    assert polyrank(*arguments).code == 2


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://[::1", "http://x:y"])
def test_bad_url_is_2(polyrank: Polyrank, url: str) -> None:
    result = polyrank("ls", "--url", url)
    assert result.code == 2
    assert "POLYRANK_URL" in result.err


def test_no_server(polyrank: Polyrank) -> None:
    result = polyrank("ls", "--url", "http://127.0.0.1:9")
    assert result.code == 1
    assert result.err.startswith("error: no server answers at http://127.0.0.1:9: ")
    assert result.err.endswith("(unreachable); start one with `polyrank serve`, or set POLYRANK_URL\n")


def test_a_proxy_is_not_asked_for_loopback(
    polyrank: Polyrank, fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert polyrank("ls").code == 0


def test_errors_for_machines(polyrank: Polyrank, fake: FakeServer) -> None:
    fake.refuse = error(503, "overloaded", "The queue\nis full.", {"Retry-After": "7"})
    result = polyrank("ls", "--json")
    facts = {"message": "The queue\nis full.", "code": "overloaded", "status": 503, "hint": "try again in 7 s"}
    assert json.loads(result.err) == {"error": facts}
    assert result.out == ""
    assert polyrank("ls").err == "error: The queue is full. (overloaded); try again in 7 s\n"


def test_an_answer_that_is_not_ours(polyrank: Polyrank, fake: FakeServer) -> None:
    from starlette.responses import HTMLResponse

    fake.refuse = HTMLResponse("<h1>hello</h1>")
    assert "is this a Polyrank server? (bad_answer)" in polyrank("ls").err
    fake.refuse = HTMLResponse("<h1>no</h1>", status_code=502)
    assert "the server answered 502 Bad Gateway (http_error)" in polyrank("ls").err


def test_starts_without_torch() -> None:
    code = "import sys, server.cli; bad = {'torch', 'transformers', 'fastapi'} & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True)


def run_with_terminal(command: list[str], url: str) -> tuple[str, str]:
    """Runs with stderr on a terminal and stdout in a pipe; returns both outputs."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"POLYRANK_URL": url, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment, text=True) as process:
        os.close(theirs)
        seen = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            seen += piece
        assert process.stdout is not None
        out = process.stdout.read()
    os.close(ours)
    assert process.returncode == 0
    return out, seen.decode()


def test_progress_on_a_terminal_and_none_in_a_pipe(fake: FakeServer, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a", b"x" * 3_000_000)
    command = [sys.executable, "-m", "server", "push", "a", str(folder)]
    out, err = run_with_terminal(command, fake.url)
    assert out.startswith("a@1  ")
    assert "push a" in err or "the server checks it" in err
    assert "MiB" in err
    environment = os.environ | {"POLYRANK_URL": fake.url}
    piped = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert piped.stderr == ""


def test_a_terminal_gets_no_control_characters(
    polyrank: Polyrank, fake: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    generate._write({"text": "\x1b]0;title\x07 ok\n"})
    assert capsys.readouterr().out == printable("\x1b]0;title\x07 ok\n") == "�]0;title� ok\n"


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 20, "3.0 MiB"), (5 << 40, "5120.0 GiB")]
)
def test_sizes_in_words(count: int, words: str) -> None:
    assert size(count) == words
