"""Methods that PEFT does not have, from upload to answer: all in one batch, each against a model with its weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters_store.formats import peft
from adapters_store.limits import Limits
from adapters_store.log import open_store
from adapters_store.registry import AdapterRegistry
from adapters_store.variants import WHOLE, Variant, key_of
from server.engine.limits import EngineLimits
from server.engine.request import GenerationRequest, SamplingParams, WeightedAdapter
from server.model.loader import load_base_model
from tests.adapters_store.formats.kinds import (
    test_chosen,
    test_cores,
    test_full_rank,
    test_hydra,
    test_sara,
    test_spectral,
    test_tlora,
)
from tests.adapters_store.formats.kinds.outside import Adapt, Make, adapted_model, added, write
from tests.support.driver import CoreDriver, logprobs, tokens
from tests.support.greedy import greedy
from tests.support.models import EOS_ID, VOCABULARY, save_tiny, tiny_model

LIMITS = EngineLimits(kv_cache_memory=8 << 20, adapter_memory=64 << 20, max_batch_tokens=96)
PROMPT = [token for token in (torch.arange(3, 24) * 11 % VOCABULARY).tolist() if token != EOS_ID]
COUNT = 5


@dataclass(frozen=True)
class Case:
    """variant: which of the adapter, to which `adapt` belongs."""

    fields: dict[str, Any]
    make: Make
    adapt: Adapt
    variant: Variant = WHOLE


CASES = {
    "xs": Case(test_cores.FIELDS, test_cores.core_only, added(test_cores.from_the_base)),
    "svfit": Case(test_spectral.SVFIT, test_spectral.values, test_spectral.svfit),
    "salt": Case(test_spectral.SALT, test_spectral.salt_parts, test_spectral.salt_with(relu=True)),
    "hydra": Case(test_hydra.FIELDS, test_hydra.make, test_hydra.adapt),
    "tlora": Case(test_tlora.FIELDS, test_tlora.make, test_tlora.adapt),
    "sara": Case(test_sara.LISTED, test_sara.listed, test_sara.with_listed),
    "bits": Case(test_full_rank.BITS, test_full_rank.packed, added(test_full_rank.unpacked)),
    "eight": Case(
        test_full_rank.FULL,
        test_full_rank.eight_bits,
        added(lambda weight, parts: parts["delta_scale"][:, None] * parts["delta"].float()),
    ),
    "dylora": Case(test_chosen.DYLORA, test_chosen.factors, added(test_chosen.truncated(3)), Variant(rank=3)),
}


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_one_batch_of_all(tmp_path: Path, architecture: str) -> None:
    plain = tiny_model(architecture)
    base = load_base_model(str(save_tiny(tmp_path / "base", architecture)), dtype=torch.float32)
    registry = AdapterRegistry(open_store("memory://"), base.spec, Limits())
    driver, expected = CoreDriver(base, LIMITS, registry.load), {}
    sampling = SamplingParams(max_tokens=COUNT, temperature=0, logprobs=0, ignore_eos=True)
    for name, case in CASES.items():
        folder = tmp_path / name
        tensors = write(plain, architecture, case.fields, folder, case.make)
        model = adapted_model(plain, architecture, tensors, case.adapt)
        expected[name] = greedy(model, PROMPT, COUNT)
        config = (folder / peft.CONFIG_FILE).read_bytes()
        info, _ = registry.add(name, config, folder / peft.WEIGHTS_FILE)
        chosen = (WeightedAdapter(key_of(info.digest, case.variant), 1.0),)
        driver.add(GenerationRequest(name, tuple(PROMPT), sampling, chosen))
    driver.drain()
    for name, (ids, logs) in expected.items():
        outputs = driver.outputs[name]
        assert tokens(outputs) == ids, name
        torch.testing.assert_close(torch.tensor(logprobs(outputs)), torch.tensor(logs), atol=2e-3, rtol=0)
    assert len({tuple(ids) for ids, _ in expected.values()}) == len(CASES), "two adapters answer alike"
