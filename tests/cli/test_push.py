"""`polyrank push`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.conftest import Polyrank, peft_folder
from tests.cli.fake_server import FakeServer, error


def test_uploads_both_files(polyrank: Polyrank, fake: FakeServer, folder: Path) -> None:
    result = polyrank("push", "legal-v2", folder)
    assert result.code == 0
    assert fake.versions["legal-v2"] == [(b'{"peft_type": "LORA"}', b"weights" * 100)]
    assert fake.requests == ["PUT /adapters/legal-v2"]
    name, facts = result.out.splitlines()
    assert name == f"legal-v2@1  {fake.info('legal-v2', 1)['digest']}"
    assert facts == "lora, rank 4-8, modules 60/210, 700 B"
    assert result.err == ""


def test_large_weights_arrive_whole(polyrank: Polyrank, fake: FakeServer, tmp_path: Path) -> None:
    weights = bytes(range(256)) * 20_000
    assert polyrank("push", "big", peft_folder(tmp_path / "big", weights)).code == 0
    assert fake.versions["big"][0][1] == weights


def test_same_content_again_is_said(polyrank: Polyrank, fake: FakeServer, folder: Path) -> None:
    polyrank("push", "a", folder)
    result = polyrank("push", "a", folder)
    assert result.code == 0
    assert "already there, unchanged" in result.out
    assert len(fake.versions["a"]) == 1


def test_other_content_needs_replace(polyrank: Polyrank, fake: FakeServer, folder: Path, tmp_path: Path) -> None:
    polyrank("push", "a", folder)
    other = peft_folder(tmp_path / "other", b"other")
    refused = polyrank("push", "a", other)
    assert refused.code == 1
    assert refused.err == "error: a holds other content. (adapter_exists); --replace makes this the next version\n"
    assert len(fake.versions["a"]) == 1
    replaced = polyrank("push", "a", other, "--replace")
    assert replaced.code == 0
    assert replaced.out.startswith("a@2  ")


def test_json(polyrank: Polyrank, fake: FakeServer, folder: Path) -> None:
    result = polyrank("push", "a", folder, "--json")
    assert json.loads(result.out) == fake.info("a", 1)


def test_warnings_go_to_stderr_without_control_characters(polyrank: Polyrank, fake: FakeServer, tmp_path: Path) -> None:
    result = polyrank("push", "a", peft_folder(tmp_path / "noop", b"noop"))
    assert result.err == "warning: All of B is zero. \N{REPLACEMENT CHARACTER}[31m (adapter_is_noop)\n"


def test_refusal_of_an_upload_that_is_still_running(polyrank: Polyrank, fake: FakeServer, tmp_path: Path) -> None:
    fake.refuse = error(413, "upload_too_large", "At most 1 MiB.", {"Connection": "close"})
    result = polyrank("push", "a", peft_folder(tmp_path / "big", b"x" * 30_000_000))
    assert result.code == 1
    assert "At most 1 MiB. (upload_too_large)" in result.err


def test_pickled_weights_are_not_sent_and_the_advice_works(
    polyrank: Polyrank, fake: FakeServer, folder: Path, tmp_path: Path
) -> None:
    (folder / "adapter_model.safetensors").unlink()
    factor = torch.arange(6.0).reshape(2, 3).t()
    torch.save({"lora_A": factor}, folder / "adapter_model.bin")
    result = polyrank("push", "a", folder)
    assert result.code == 1
    assert "unsupported_format" in result.err
    assert fake.requests == []
    script = result.err.partition('python -c "')[2].rstrip().removesuffix('"')
    subprocess.run([sys.executable, "-c", script], cwd=folder, check=True)
    assert torch.equal(load_file(folder / "adapter_model.safetensors")["lora_A"], factor)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_folder_that_is_no_peft_folder(polyrank: Polyrank, fake: FakeServer, folder: Path, file: str) -> None:
    (folder / file).unlink()
    result = polyrank("push", "a", folder)
    assert result.code == 1
    assert file in result.err
    assert fake.requests == []


@pytest.mark.parametrize("name", ["", "..", "a/b", "-x", "a b", "a?replace=true"])
def test_names_that_would_leave_the_path(polyrank: Polyrank, fake: FakeServer, folder: Path, name: str) -> None:
    assert polyrank("push", "--", name, folder).code == 2
    assert fake.requests == []


def test_missing_folder_is_wrong_usage(polyrank: Polyrank, fake: FakeServer, tmp_path: Path) -> None:
    assert polyrank("push", "a", tmp_path / "nowhere").code == 2
