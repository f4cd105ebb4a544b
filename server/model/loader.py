"""Loads the base model once, at the start."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from server.model.base import BaseModel
from server.model.check import check_architecture
from server.model.checkpoint import load_folder, load_gguf
from server.model.default_model import load_default
from server.model.errors import ModelLoadError
from server.model.facts import attention_shape, eos_token_ids, max_context
from server.model.fingerprint import fingerprint
from server.model.source import Source, SourceKind, resolve_source
from server.model.spec import base_spec


def load_base_model(source: str, *, dtype: torch.dtype, device: str = "cpu") -> BaseModel:
    """Load what `source` names: a model folder, a hub id, a .gguf file, or `smollm2`.

    dtype: of the weights, whatever the file holds. Raises `ModelLoadError` with what is wrong and what to do.
    Hub models come from the local cache when the network is away. Code inside a checkpoint is never run.
    """
    found = resolve_source(source)
    try:
        model, tokenizer = _read(found, dtype)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelLoadError(_explain(found, error)) from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelLoadError(f"'{source}' has no fast tokenizer (tokenizer.json). Convert it with transformers first.")
    return describe(model.to(device), tokenizer, found.id, found.aliases)


def describe(model: Any, tokenizer: Any, identity: str, aliases: tuple[str, ...] = ()) -> BaseModel:
    """Freeze a transformers causal LM and read its facts; raises `ModelLoadError` if it cannot be served."""
    check_architecture(model)
    model.eval().requires_grad_(False)
    # PEFT writes this into the adapters it trains on the model: the public id, not the place it was loaded from.
    model.name_or_path = model.config._name_or_path = identity
    config = model.config.get_text_config(decoder=True)
    heads, kv_heads, head_dim = attention_shape(config)
    return BaseModel(
        model=model,
        tokenizer=tokenizer,
        id=identity,
        architecture=type(model).__name__,
        dtype=model.dtype,
        device=model.device,
        num_layers=int(config.num_hidden_layers),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=int(config.vocab_size),
        max_context=max_context(config),
        eos_token_ids=eos_token_ids(config, getattr(model, "generation_config", None), tokenizer),
        bos_token_id=config.bos_token_id,
        spec=base_spec(model, identity, fingerprint(model, config), aliases),
    )


def _read(source: Source, dtype: torch.dtype) -> tuple[Any, Any]:
    match source.kind:
        case SourceKind.DEFAULT:
            return load_default(Path(source.location), dtype)
        case SourceKind.GGUF:
            return load_gguf(Path(source.location), dtype)
        case SourceKind.FOLDER | SourceKind.HUB:
            return load_folder(source.location, dtype)


def _explain(source: Source, error: Exception) -> str:
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    text = f"Cannot load the base model '{source.id}': {reason}"
    if "trust_remote_code" in str(error):
        return f"'{source.id}' needs code from its checkpoint, which is never run. Use a model that transformers knows."
    if source.kind == SourceKind.HUB:
        text += (
            f" If the name is right, fetch it where the network is there with `hf download {source.id}`; gated models"
            " need a token (HF_TOKEN). Only safetensors weights are read."
        )
    return text
