"""Fixtures: a fake server, the command line in this process, and PEFT folders."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from server import cli
from tests.cli.fake_server import FakeServer, running


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str


Polyrank = Callable[..., Result]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in list(os.environ):
        if key.startswith("POLYRANK_"):
            monkeypatch.delenv(key)


@pytest.fixture(scope="session")
def running_server() -> Iterator[FakeServer]:
    with running() as server:
        yield server


@pytest.fixture
def fake(running_server: FakeServer, monkeypatch: pytest.MonkeyPatch, clean_environment: None) -> FakeServer:
    """The server as new; POLYRANK_URL names it."""
    running_server.reset()
    monkeypatch.setenv("POLYRANK_URL", running_server.url)
    return running_server


@pytest.fixture
def polyrank(capsys: pytest.CaptureFixture[str]) -> Polyrank:
    def call(*arguments: str | Path) -> Result:
        code = cli.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


def peft_folder(folder: Path, weights: bytes = b"weights" * 100) -> Path:
    """A folder that looks like PEFT's; the fake server does not read the files."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return peft_folder(tmp_path / "my-adapter")
