"""The loaded base model and what the rest of the engine must know of it."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from adapters_store.forms import BaseSpec


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A causal language model in eval mode, without gradients, and its plain facts.

    model: transformers' own module; tokenizer: a transformers fast tokenizer; id: public id; architecture: class name.
    num_kv_heads and head_dim hold for every layer (others are refused). vocabulary: width of the logits, which may
    be more than the tokenizer knows. max_context: positions the model may be given, in tokens. eos_token_ids: every
    token that ends an answer, the generation config's first. fingerprint: see `server.model.fingerprint`.
    """

    model: PreTrainedModel
    tokenizer: Any
    id: str
    architecture: str
    dtype: torch.dtype
    device: torch.device
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary: int
    max_context: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    spec: BaseSpec

    @property
    def fingerprint(self) -> str:
        return self.spec.fingerprint
