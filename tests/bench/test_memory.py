"""Memory of adapters in peers: PEFT measured on a tiny model, and what is told where a peer cannot be measured."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.bench.options import parse
from tests.bench.peers.peft_memory import measure
from tests.bench.peers.vllm_memory import tensors
from tests.bench.results import Results
from tests.bench.sections.adapters import _against_peers
from tests.bench.sections.memory import peft_bytes, vllm_bytes
from tests.support.models import save_tiny, tiny_model
from tests.support.peft_oracle import random_lora


class Told(Results):
    """A session without a base model of its own."""

    def __init__(self, base: Path, **options: Any) -> None:
        super().__init__()
        self.options = replace(parse([], {}), **options)
        self.base_folder = base


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A base, and three adapters for it."""
    model = tiny_model("llama")
    for number in range(3):
        random_lora(tmp_path / "adapters" / f"a{number}", model, number, r=4, lora_alpha=8)
    return save_tiny(tmp_path / "base", "llama"), tmp_path / "adapters"


def test_peft_holds_the_parameters_of_every_adapter(folders: tuple[Path, Path]) -> None:
    base, adapters = folders
    found = measure(base, adapters, torch.float32)
    numbers = 4 * sum(
        module.in_features + module.out_features
        for name, module in tiny_model("llama").named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name
    )
    assert found["parameters"] == 4 * numbers


def test_a_peer_in_a_process_of_its_own(folders: tuple[Path, Path]) -> None:
    base, adapters = folders
    session: Any = Told(base)
    found = peft_bytes(session, adapters)
    assert found is not None
    assert found["parameters"] == measure(base, adapters, torch.float32)["parameters"]
    assert session.skipped == {}


def test_what_cannot_be_measured_is_told(tmp_path: Path) -> None:
    session: Any = Told(tmp_path)
    assert vllm_bytes(session, tmp_path, 8) is None
    assert "--peer vllm=PATH" in session.skipped["memory of vllm"]
    session = Told(tmp_path, paths={"vllm": sys.executable})  # which has no vllm
    assert vllm_bytes(session, tmp_path, 8) is None
    assert "vllm" in session.skipped["memory of vllm"]
    session = Told(tmp_path, without=("peft", "vllm"))
    assert peft_bytes(session, tmp_path) is vllm_bytes(session, tmp_path, 8) is None
    assert session.skipped == {}


def test_ratios_are_ours_to_theirs(tmp_path: Path) -> None:
    session: Any = Told(tmp_path)
    ours = {"pool": 100.0, "process growth": 150.0}
    _against_peers(session, 8, ours, {"parameters": 200.0, "growth": 300.0}, {"slot": 400.0, "cached": 1.0})
    assert [ratio["median"] for ratio in session.ratios] == [0.5, 0.5, 0.25]
    _against_peers(session, 8, ours, None, None)
    assert len(session.ratios) == 3


def test_tensors_of_nested_lists() -> None:
    one, two = SimpleNamespace(nbytes=1), SimpleNamespace(nbytes=2)
    assert list(tensors([(one, None), [[two]]])) == [one, two]
