"""`polyrank bench` against a server like vLLM, well and badly behaved, and against ours."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from server import cli
from tests.load.fake_openai import FakeOpenAI, running
from tests.support.server_process import free_port


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOpenAI]:
    monkeypatch.setenv("POLYRANK_API_KEY", "sk-key")
    with running() as fake:
        yield fake


def bench(*arguments: str) -> int:
    return cli.run(["bench", *arguments])


def test_counts_times_and_tables(fake: FakeOpenAI, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [word for name in ("a", "b", "c") for word in ("--adapter", name)]
    options = ("--requests", "12", "--concurrency", "4", "--input-tokens", "6", "--output-tokens", "5")
    code = bench(
        "--url", fake.url, *names, *options, "--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")
    )
    out = capsys.readouterr().out
    assert code == 0
    assert fake.counts == {"a": 5, "b": 5, "c": 5}, "one more of each to warm up"
    assert fake.keys == {"Bearer sk-key"}
    assert 1 < fake.most <= 4
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["requests"], found["answered"], found["errors"]) == (12, 12, {})
    assert (found["input_tokens"], found["output_tokens"]) == (72, 60)
    assert found["output_tokens_per_second"] == pytest.approx(60 / found["seconds"], rel=0.05)
    for times in ("ttft_ms", "itl_ms", "e2e_ms"):
        assert 0 <= found[times]["p50"] <= found[times]["p90"] <= found[times]["p99"]
    assert found["ttft_ms"]["p50"] < found["e2e_ms"]["p50"]
    assert [own["requests"] for own in found["models"].values()] == [4, 4, 4]
    assert "12 of 12 answered" in out
    assert "first token" in out
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_errors_are_told_by_code_and_by_adapter(
    fake: FakeOpenAI, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fake.behaviour = {"r": "refuse", "b": "break", "c": "cut", "g": "garble"}
    names = [word for name in ("good", *fake.behaviour) for word in ("--adapter", name)]
    assert bench("--url", fake.url, *names, "--requests", "10", "--output-tokens", "2", "--json", "-") == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["errors"] == {"200 engine_failure": 2, "404 NotFoundError": 2, "bad_event": 2, "truncated": 2}
    assert (found["answered"], found["output_tokens"]) == (2, 4)
    answered = dict.fromkeys(fake.behaviour, 0) | {"good": 2}
    assert {name: own["answered"] for name, own in found["models"].items()} == answered
    assert "4 of 5 requests of the warm-up failed" in captured.err


def test_nothing_answered_is_exit_code_1(fake: FakeOpenAI, capsys: pytest.CaptureFixture[str]) -> None:
    fake.behaviour = {"r": "refuse"}
    assert bench("--url", fake.url, "--model", "r", "--requests", "2") == 1
    assert "404 NotFoundError" in capsys.readouterr().out


def test_the_base_is_asked_for_unless_told(fake: FakeOpenAI) -> None:
    assert bench("--url", fake.url, "--requests", "2", "--warmup", "0", "--output-tokens", "1") == 0
    assert fake.counts == {"base": 2}


def test_at_a_rate_all_go_out_in_time(fake: FakeOpenAI, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--requests", "20", "--rate", "100", "--output-tokens", "1", "--seed", "4", "--json", "-")
    assert bench("--url", fake.url, *options) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["answered"] == 20
    assert found["options"]["concurrency"] is None


def test_ctrl_c_shows_what_there_is(fake: FakeOpenAI) -> None:
    fake.behaviour = {"slow": "hang"}
    command = [sys.executable, "-m", "server", "bench", "--url", fake.url, "--adapter", "quick", "--adapter", "slow"]
    command += ["--warmup", "0", "--requests", "4", "--concurrency", "4", "--output-tokens", "2"]
    # Whoever runs the tests in the background may have had SIGINT ignored, which a process inherits.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard
    ) as process:
        assert fake.hanging.wait(120)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "of 2 answered" in out or "of 1 answered" in out or "0 of 0 answered" in out
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(("--assign", "worst"), "round-robin, random, zipf"), (("--endpoint", "chat"), "completions, generate")],
)
def test_wrong_words(
    fake: FakeOpenAI, arguments: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--url", fake.url, *arguments) == 2
    assert text in " ".join(capsys.readouterr().err.split())


def test_without_matplotlib_it_says_what_to_install(
    fake: FakeOpenAI, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("server.commands.bench.find_spec", lambda name: None)
    assert bench("--url", fake.url, "--plot", "x.png") == 1
    assert "pip install 'polyrank[plot]'" in capsys.readouterr().err
    assert fake.bodies == []


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert bench("--url", url, "--model", "x", "--requests", "2", "--warmup", "0", "--json", "-") == 1
    assert json.loads(capsys.readouterr().out)["errors"] == {"unreachable": 2}
