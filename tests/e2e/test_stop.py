"""SIGTERM to the whole service while it generates."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import httpx

from tests.support.models import save_tiny
from tests.support.server_process import ServerProcess, free_port

TOKENS = 1500


def test_a_stream_is_finished_while_new_requests_are_refused(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama", max_position_embeddings=2048)
    options = ("--drain-seconds", "600")
    server = ServerProcess(str(base), tmp_path / "store", "--no-compile", *options, log=tmp_path / "log")
    body = {"inputs": "the answer", "parameters": {"max_new_tokens": TOKENS, "ignore_eos": True}}
    with server, httpx.Client(base_url=server.url, timeout=120) as client:
        with client.stream("POST", "/generate_stream", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.ask_to_stop()
            with httpx.Client(base_url=server.url, timeout=60) as other:
                while other.get("/ready").status_code == 200:
                    pass
                assert other.post("/generate", json=body).status_code == 503
            last = json.loads([line for line in lines if line][-1].removeprefix("data:"))
        assert last["details"]["generated_tokens"] == TOKENS
        assert server.wait() == 0


def test_a_start_can_be_broken_off(tmp_path: Path) -> None:
    options = ["--model", str(save_tiny(tmp_path / "base", "llama")), "--store", str(tmp_path / "store")]
    command = [sys.executable, "-m", "server", "serve", "--port", str(free_port()), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert any("loading_model" in line for line in process.stderr)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
