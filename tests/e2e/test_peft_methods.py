"""PEFT's methods that fold, from upload to answer: all in one batch, each against PEFT's own model."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    C3AConfig,
    FrodConfig,
    HRAConfig,
    KasaConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    PeftConfig,
    PolyConfig,
    PsoftConfig,
    RandLoraConfig,
    TinyLoraConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
)

from adapters_store.formats import peft
from adapters_store.limits import Limits
from adapters_store.log import open_store
from adapters_store.registry import AdapterRegistry
from adapters_store.variants import WHOLE, Variant, key_of
from server.engine.limits import EngineLimits
from server.engine.request import GenerationRequest, SamplingParams, WeightedAdapter
from server.model.loader import load_base_model
from tests.adapters_store.formats.kinds.support import options, trained
from tests.support.driver import CoreDriver, logprobs, tokens
from tests.support.greedy import greedy
from tests.support.models import EOS_ID, VOCABULARY, save_tiny

LIMITS = EngineLimits(kv_cache_memory=8 << 20, adapter_memory=64 << 20, max_batch_tokens=96)
PROMPT = [token for token in (torch.arange(3, 24) * 11 % VOCABULARY).tolist() if token != EOS_ID]
COUNT = 5
TASK = 2
CASES: dict[str, tuple[type[PeftConfig], dict[str, Any]]] = {
    "vera": (VeraConfig, {"r": 7, "save_projection": False}),
    "loha": (LoHaConfig, {"r": 3}),
    "lokr": (LoKrConfig, {"r": 16}),  # dense on some modules
    "vblora": (VBLoRAConfig, {"r": 3, "num_vectors": 12, "vector_length": 16}),
    "unilora": (UniLoraConfig, {"r": 3}),
    "tinylora": (TinyLoraConfig, {"r": 3, "u": 5}),
    "psoft": (PsoftConfig, {"r": 6}),
    "miss": (MissConfig, {"r": 8, "init_weights": "bat"}),
    "hra": (HRAConfig, {"r": 5}),
    "randlora": (RandLoraConfig, {"r": 5}),
    "c3a": (C3AConfig, {"block_size": 16}),
    "frod": (FrodConfig, {"progressbar": False}),
    "kasa": (LoraConfig, {"r": 4, "kasa_config": KasaConfig()}),
    "pissa": (LoraConfig, {"r": 4, "init_lora_weights": "pissa"}),
    "poly": (PolyConfig, {"r": 4, "n_tasks": 3, "n_skills": 2}),
}


def change(name: str, parameter: torch.Tensor) -> None:
    """Zero-mean; the scale of RandLoRA's delta is large."""
    parameter.normal_(0.0, 0.02 if "randlora" in name else 0.3)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_one_batch_of_all(tmp_path: Path, architecture: str) -> None:
    base = load_base_model(str(save_tiny(tmp_path / "base", architecture)), dtype=torch.float32)
    registry = AdapterRegistry(open_store("memory://"), base.spec, Limits())
    driver, expected = CoreDriver(base, LIMITS, registry.load), {}
    sampling = SamplingParams(max_tokens=COUNT, temperature=0, logprobs=0, ignore_eos=True)
    for name, (kind, further) in CASES.items():
        folder = tmp_path / name
        _, adapted = trained(architecture, kind(**options(architecture, **further)), folder, change=change)
        model = partial(adapted, task_ids=torch.tensor([TASK])) if name == "poly" else adapted
        expected[name] = greedy(model, PROMPT, COUNT)
        info, _ = registry.add(name, (folder / peft.CONFIG_FILE).read_bytes(), folder / peft.WEIGHTS_FILE)
        key = key_of(info.digest, Variant(task=TASK) if name == "poly" else WHOLE)
        driver.add(GenerationRequest(name, tuple(PROMPT), sampling, (WeightedAdapter(key, 1.0),)))
    driver.drain()
    for name, (ids, logs) in expected.items():
        outputs = driver.outputs[name]
        assert tokens(outputs) == ids, name
        torch.testing.assert_close(torch.tensor(logprobs(outputs)), torch.tensor(logs), atol=2e-3, rtol=0)
    assert len({tuple(ids) for ids, _ in expected.values()}) == len(CASES), "two adapters answer alike"
