"""A task adapter over EoRA (arXiv 2410.21271): both named in one request, against weights that hold both deltas."""

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from adapters_store.limits import Limits
from adapters_store.log import open_store
from adapters_store.registry import AdapterRegistry
from server.engine.limits import EngineLimits
from server.engine.request import GenerationRequest, SamplingParams, WeightedAdapter
from server.model.loader import load_base_model
from tests.support.driver import CoreDriver, logprobs, tokens
from tests.support.greedy import greedy
from tests.support.models import VOCABULARY, save_tiny, tiny_model

RANK = 8
LIMITS = EngineLimits(kv_cache_memory=8 << 20, adapter_memory=64 << 20, max_batch_tokens=64)
PROMPT = tuple(torch.arange(3, 30).mul(11).remainder(VOCABULARY).tolist())
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


def compensation(lost: torch.Tensor, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As EoRA: of `X X^T = Q L Q^T` the error in the space `Q sqrt(L)`, cut to its largest ranks, and back."""
    values, vectors = torch.linalg.eigh(inputs.double() @ inputs.double().T)
    space = vectors @ torch.diag(values.clamp_min(1e-9).sqrt())
    u, s, v = torch.linalg.svd(lost.double() @ space, full_matrices=False)
    root = s[:RANK].sqrt()
    b, a = u[:, :RANK] * root, (root[:, None] * v[:RANK]) @ torch.linalg.inv(space)
    return a.float(), b.float()


def upload(registry: AdapterRegistry, folder: Path, name: str, factors: Factors) -> str:
    """A plain LoRA in PEFT's names, of scale 1. Gives its digest."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj", "up_proj"]}
    tensors: dict[str, torch.Tensor] = {}
    for module, (a, b) in factors.items():
        tensors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "weights")
    return registry.add(name, json.dumps(config).encode(), folder / "weights")[0].digest


def test_a_task_adapter_runs_over_eora(tmp_path: Path) -> None:
    """The base that is served is the compressed one: its weights in steps of 1/4."""
    original = tiny_model("llama")
    folder = save_tiny(tmp_path / "base", "llama")
    base, generator = load_base_model(str(folder), dtype=torch.float32), torch.Generator().manual_seed(0)
    eora: Factors = {}
    task: Factors = {}
    dense = copy.deepcopy(original)
    for name, module in base.model.named_modules():
        if name.endswith(("q_proj", "up_proj")):
            whole = module.weight.data.clone()
            module.weight.data = (whole * 4).round() / 4
            inputs = torch.randn(whole.shape[1], 200, generator=generator)
            eora[name] = compensation(whole - module.weight.data, inputs)
            shapes = ((RANK, whole.shape[1]), (whole.shape[0], RANK))
            a, b = (torch.randn(*shape, generator=generator) * 0.1 for shape in shapes)
            task[name] = (a, b)
            changed = module.weight.data + b @ a + eora[name][1] @ eora[name][0]
            dense.get_submodule(name).weight = torch.nn.Parameter(changed)
    registry = AdapterRegistry(open_store("memory://"), base.spec, Limits())
    digests = [upload(registry, tmp_path / name, name, each) for name, each in (("eora", eora), ("task", task))]
    driver = CoreDriver(base, LIMITS, registry.load)
    found = {}
    for label, chosen in (("both", digests), ("task alone", digests[1:]), ("eora alone", digests[:1])):
        sampling = SamplingParams(max_tokens=6, temperature=0, logprobs=0)
        adapters = tuple(WeightedAdapter(digest, 1.0) for digest in chosen)
        outputs = driver.run(GenerationRequest(label, PROMPT, sampling, adapters))
        found[label] = (tokens(outputs), logprobs(outputs))
    expected = greedy(dense, PROMPT, 6)
    assert found["both"][0] == expected[0]
    torch.testing.assert_close(torch.tensor(found["both"][1]), torch.tensor(expected[1]), atol=1e-3, rtol=0)
    for label in ("task alone", "eora alone"):
        off = (torch.tensor(found[label][1]) - torch.tensor(expected[1])).abs().max()
        assert off > 1e-2, f"{label} would do as well"
