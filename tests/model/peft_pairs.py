"""PEFT models with random adapters, and the same factors laid out as pool and records."""

import warnings
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from kernels.segments import ALIGNMENT, FACTOR_DTYPES, RECORD_FIELDS, Field
from server.model.step_context import StepContext


def peft_model(plain: Any, targets: list[str], ranks: dict[str, int], seed: int = 0) -> PeftModel:
    """Adapters `ranks` (name -> rank) on `targets` of `plain`, with random zero-mean factors of their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out of Conv1D, tied weights: what PEFT does then is the point
        model: Any = None
        for name, rank in ranks.items():
            config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
            if model is None:
                model = get_peft_model(plain, config, adapter_name=name)
            else:
                model.add_adapter(name, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.15)
    return model.eval()


def peft_logits(model: PeftModel, tokens: list[int], adapter: str | None) -> torch.Tensor:
    """Logits of one request alone, [tokens, vocabulary]; no adapter: the base model."""
    inputs = {"input_ids": torch.tensor([tokens]), "use_cache": False}
    logits: torch.Tensor
    with torch.inference_mode():
        if adapter is None:
            with model.disable_adapter():
                logits = model(**inputs).logits[0]
        else:
            model.set_adapter(adapter)
            logits = model(**inputs).logits[0]
    return logits


class PoolBuilder:
    """Appends blocks to a uint8 pool, each on its own cache line."""

    def __init__(self) -> None:
        self.blocks: list[torch.Tensor] = []
        self.size = 0

    def add(self, block: torch.Tensor) -> int:
        """Byte offset of the block."""
        offset = self.size
        raw = block.detach().contiguous().reshape(-1).view(torch.uint8)
        padding = -len(raw) % ALIGNMENT
        self.blocks += [raw, torch.zeros(padding, dtype=torch.uint8)]
        self.size += len(raw) + padding
        return offset

    def pool(self) -> torch.Tensor:
        return torch.cat([*self.blocks, torch.zeros(ALIGNMENT, dtype=torch.uint8)])


def empty_record() -> list[int]:
    record = [-1] * RECORD_FIELDS
    record[Field.RANK] = 0
    record[Field.DTYPE] = FACTOR_DTYPES.index(torch.float32)
    return record


def lay_out(model: PeftModel, context: StepContext, slots: dict[str, int]) -> None:
    """Put every adapter of the PEFT model into the pool and its slot of the table."""
    assert context.table is not None
    builder = PoolBuilder()
    for full_name, layer in model.base_model.model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        for adapter, slot in slots.items():
            if adapter not in layer.scaling:
                continue
            context.table.set(slot, context.module_index[full_name], _record(builder, layer, adapter))
    context.pool = builder.pool()


def _record(builder: PoolBuilder, layer: Any, adapter: str) -> list[int]:
    if adapter in layer.lora_embedding_A:
        a, b = layer.lora_embedding_A[adapter].T, layer.lora_embedding_B[adapter]
        rank = a.shape[1]
    else:
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        rank = a.shape[0]
    record = empty_record()
    record[Field.RANK] = rank
    record[Field.A] = builder.add(a)
    record[Field.B] = builder.add(b.T)
    scale = float(layer.scaling[adapter]) * float(getattr(layer.get_base_layer(), "embed_scale", 1.0))
    record[Field.D] = builder.add(torch.full((rank,), scale))
    return record
