"""A small base model on paper, adapters for it, and crafted files."""

import json
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapters_store.errors import CodedError
from adapters_store.forms import BaseSpec, ModuleSpec
from adapters_store.info import AdapterInfo
from adapters_store.log import Log
from adapters_store.objects import Objects
from adapters_store.registry import AdapterRegistry
from server.model.facts import attention_shape
from server.model.spec import norm_facts

WIDTH, NARROW, WIDE, VOCABULARY = 8, 4, 12, 32
MODULES = {
    "model.embed_tokens": ModuleSpec("embedding", VOCABULARY, WIDTH),
    "lm_head": ModuleSpec("linear", WIDTH, VOCABULARY),
} | {
    f"model.layers.{layer}.{name}": ModuleSpec("linear", inputs, outputs)
    for layer in range(2)
    for name, inputs, outputs in (
        ("self_attn.q_proj", WIDTH, WIDTH),
        ("self_attn.v_proj", WIDTH, NARROW),
        ("mlp.down_proj", WIDE, WIDTH),
    )
}
BASE = BaseSpec("tiny", "f" * 64, MODULES, head="lm_head", tied=True)
PREFIX = "base_model.model."
Tensors = dict[str, torch.Tensor]
Upload = Callable[..., tuple[AdapterInfo, bool]]  # (name, seed, **options of `AdapterRegistry.add`)


def config(**changes: Any) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj"],
        **changes,
    }


def factors(
    seed: int = 0, targets: tuple[str, ...] = ("q_proj", "v_proj"), rank: int = 2, dtype: torch.dtype = torch.float32
) -> Tensors:
    """Zero-mean random LoRA tensors, as PEFT names them, for every module of BASE that ends in one of `targets`."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, spec in MODULES.items():
        if name.endswith(targets):
            a = torch.randn(rank, spec.in_features, generator=generator)
            b = torch.randn(spec.out_features, rank, generator=generator)
            tensors[f"{PREFIX}{name}.lora_A.weight"] = a.to(dtype)
            tensors[f"{PREFIX}{name}.lora_B.weight"] = b.to(dtype)
    return tensors


def write(folder: Path, tensors: Tensors | bytes, settings: dict[str, Any] | bytes | None = None) -> tuple[bytes, Path]:
    """The two files of an upload: the config's bytes, the weights' path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "weights"
    path.write_bytes(tensors if isinstance(tensors, bytes) else save(tensors, metadata={"format": "pt"}))
    made = settings if isinstance(settings, bytes) else json.dumps(config() if settings is None else settings).encode()
    return made, path


def craft(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with any header: an object becomes JSON, bytes stay as they are."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(shape: list[int], start: int = 0, dtype: str = "F32", size: int = 4) -> dict[str, Any]:
    count = 1
    for dimension in shape:
        count *= dimension
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + count * size]}


def spec_of(model: Any, identity: str = "tiny") -> BaseSpec:
    """The base as an importer sees it, with its weights to compare copies with."""
    modules = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            modules[name] = ModuleSpec("linear", module.in_features, module.out_features, module.bias is not None)
        elif isinstance(module, Conv1D):
            modules[name] = ModuleSpec("conv1d", module.nx, module.nf, bias=True)
        elif isinstance(module, nn.Embedding):
            scale = float(getattr(module, "embed_scale", 1.0))
            modules[name] = ModuleSpec("embedding", module.num_embeddings, module.embedding_dim, scale=scale)
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight

    def weight(name: str) -> torch.Tensor:
        found: torch.Tensor = model.get_submodule(name).weight
        return found

    def bias(name: str) -> torch.Tensor:
        found: torch.Tensor = model.get_submodule(name).bias
        return found

    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    kv = (model.config.num_hidden_layers, *attention_shape(model.config)[1:])
    return BaseSpec(
        identity,
        "f" * 64,
        modules,
        head,
        tied,
        weight=weight,
        bias=bias,
        **norm_facts(model),
        input_embedding=embedding,
        kv=kv,
    )


def store_files(root: Path) -> list[str]:
    """Every file of a local store but its lock."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and path.name != "lock")


def restarted(objects: Objects) -> AdapterRegistry:
    return AdapterRegistry(Log(objects), BASE)


def race(count: int, action: Callable[[int], object]) -> list[object]:
    """What each of `count` threads got from its action, begun at the same instant: a value or a refusal."""
    outcomes: list[object] = [None] * count
    start = threading.Barrier(count)

    def run(number: int) -> None:
        start.wait()
        try:
            outcomes[number] = action(number)
        except CodedError as error:
            outcomes[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes
