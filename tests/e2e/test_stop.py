"""SIGTERM to the whole service while it generates."""

import json
from pathlib import Path

import httpx

from tests.support.models import save_tiny
from tests.support.server_process import ServerProcess

TOKENS = 1500


def test_a_stream_is_finished_while_new_requests_are_refused(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama", max_position_embeddings=2048)
    options = ("--drain-seconds", "600")
    server = ServerProcess(str(base), tmp_path / "store", *options, log=tmp_path / "log")
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
