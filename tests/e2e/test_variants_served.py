"""Variants of one adapter through store and engine: each request gets its own, whatever the batch mixes."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters_store import variants
from adapters_store.limits import Limits
from adapters_store.log import open_store
from adapters_store.registry import AdapterRegistry
from server.engine.limits import EngineLimits
from server.engine.request import GenerationRequest, SamplingParams, WeightedAdapter
from server.model.loader import load_base_model
from tests.support.driver import CoreDriver, logprobs, tokens
from tests.support.models import save_tiny, tiny_model
from tests.support.peft_oracle import ALL_LINEAR, PeftOracle, random_lora

RANK, ALPHA = 6, 12
RANKS = (1, 3, 4, RANK)
GATES = (0.0, 0.3, 0.5, 1.0)
LIMITS = EngineLimits(kv_cache_memory=4 << 20, adapter_memory=16 << 20, max_batch_tokens=24)
PROMPT = tuple(range(20, 57))
NEW_TOKENS = 6
TOLERANCE = 1e-3  # of log probabilities, float32


def upload(registry: AdapterRegistry, name: str, folder: Path, config: dict[str, object]) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"target_modules": list(ALL_LINEAR), **config}))
    registry.add(name, (folder / "adapter_config.json").read_bytes(), folder / "adapter_model.safetensors")


class Served:
    """`dial`, a DyLoRA, and `mix`, a PETALface; the oracle has a LoRA for each rank and for each branch."""

    def __init__(self, root: Path) -> None:
        folder, plain = save_tiny(root / "base", "llama"), tiny_model("llama")
        self.base = load_base_model(str(folder), dtype=torch.float32)
        self.registry = AdapterRegistry(open_store("memory://"), self.base.spec, Limits())
        whole = random_lora(root / "dial", plain, 1, r=RANK, lora_alpha=ALPHA)
        folders = {f"rank-{rank}": self._truncated(root, whole, rank) for rank in RANKS}
        upload(self.registry, "dial", whole, {"peft_type": "DYLORA", "r": RANK, "lora_alpha": ALPHA})
        for branch in (0, 1):
            folders[f"branch-{branch}"] = random_lora(root / f"branch-{branch}", plain, 2 + branch, r=4, lora_alpha=4)
        tensors = {}
        for branch, suffix in ((1, ""), (0, "2")):  # the authors' second branch is the one whose share is the gate
            for name, tensor in load_file(folders[f"branch-{branch}"] / "adapter_model.safetensors").items():
                renamed = name.replace("lora_A", f"trainable_lora_down{suffix}")
                tensors[renamed.replace("lora_B", f"trainable_lora_up{suffix}")] = tensor
        (root / "mix").mkdir()
        save_file(tensors, root / "mix" / "adapter_model.safetensors")
        upload(self.registry, "mix", root / "mix", {"peft_type": "PETALFACE", "r": 4, "lora_scale": 1.0, "gate": 0.5})
        self.oracle = PeftOracle(plain, folders)

    def adapters(self, name: str, **values: float) -> tuple[WeightedAdapter, ...]:
        """As the door makes them of a request."""
        ref = self.registry.resolve(name)
        chosen = variants.chosen(ref.knobs, values)
        return tuple(WeightedAdapter(variants.key_of(ref.digest, variant), share) for variant, share in chosen)

    @staticmethod
    def _truncated(root: Path, whole: Path, rank: int) -> Path:
        made = root / f"rank-{rank}"
        made.mkdir()
        tensors = {
            name: (tensor[:rank] if "lora_A" in name else tensor[:, :rank]).contiguous()
            for name, tensor in load_file(whole / "adapter_model.safetensors").items()
        }
        save_file(tensors, made / "adapter_model.safetensors")
        config = json.loads((whole / "adapter_config.json").read_text())
        (made / "adapter_config.json").write_text(json.dumps({**config, "r": rank, "lora_alpha": ALPHA}))
        return made


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("variants"))


def requests(
    asked: Iterable[tuple[str, tuple[WeightedAdapter, ...]]],
) -> Iterable[GenerationRequest]:
    for request_id, adapters in asked:
        params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, logprobs=0)
        yield GenerationRequest(request_id, PROMPT, params, adapters)


def test_each_request_gets_its_variant(served: Served) -> None:
    """One prompt for all, twice: what a cache keeps of one variant must not serve another."""
    asked: dict[str, tuple[tuple[WeightedAdapter, ...], tuple[tuple[str, float], ...]]] = {"base": ((), ())}
    for rank in RANKS:
        asked[f"rank {rank}"] = (served.adapters("dial", rank=rank), ((f"rank-{rank}", 1.0),))
    for gate in GATES:
        parts = tuple((name, w) for name, w in (("branch-0", gate), ("branch-1", 1 - gate)) if w)
        asked[f"gate {gate}"] = (served.adapters("mix", gate=gate), parts)
    driver = CoreDriver(served.base, LIMITS, served.registry.load)
    expected = {name: served.oracle.greedy(PROMPT, oracle, NEW_TOKENS) for name, (_, oracle) in asked.items()}
    assert len({tuple(logs) for _, logs in expected.values()}) == len(asked), "else the test would prove nothing"
    for turn in ("first", "again"):
        for request in requests((f"{name}, {turn}", adapters) for name, (adapters, _) in asked.items()):
            driver.add(request)
        driver.drain()
        for name, (chosen, logs) in expected.items():
            outputs = driver.outputs[f"{name}, {turn}"]
            assert tokens(outputs) == chosen, name
            assert logprobs(outputs) == pytest.approx(logs, abs=TOLERANCE)
    assert driver.core.stats.prefix_hit_tokens_total == len(asked) * ((len(PROMPT) - 1) // 16 * 16)
    ranks, branches = len(RANKS) - 1, 2
    assert driver.core.stats.adapters_resident == 1 + ranks + 1 + branches  # beside each adapter as it is by default


def test_the_default_is_no_variant(served: Served) -> None:
    digest = served.registry.resolve("dial").digest
    assert served.adapters("dial", rank=RANK) == served.adapters("dial") == (WeightedAdapter(digest),)
