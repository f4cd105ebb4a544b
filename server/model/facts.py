"""Plain facts of a model, read from its config."""

from typing import Any

from server.model.errors import ModelLoadError


def attention_shape(config: Any) -> tuple[int, int, int]:
    """Query heads, key-value heads, and size of a head."""
    heads = _number(config, "num_attention_heads")
    try:
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or _number(config, "hidden_size") // heads
    except RuntimeError as error:  # transformers' word for a value that differs between layers (Gemma 4)
        raise ModelLoadError("The model's layers differ in their attention heads, which is not supported.") from error
    return heads, int(kv_heads), int(head_dim)


def max_context(config: Any) -> int:
    """Positions the model may be given.

    With `longrope` transformers changes the frequencies of the whole batch as soon as one position of it passes
    the original length; a request's answer would depend on its batch-mates, so the original length is the limit.
    """
    limit = _number(config, "max_position_embeddings")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        original = rope.get("original_max_position_embeddings")
        limit = min(limit, original or getattr(config, "original_max_position_embeddings", None) or limit)
    return limit


def eos_token_ids(config: Any, generation_config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends an answer: the generation config's, then the config's, else the tokenizer's."""
    found: dict[int, None] = {}
    for holder in (generation_config, config):
        value = getattr(holder, "eos_token_id", None)
        for token in value if isinstance(value, list | tuple) else [value]:
            if token is not None:
                found[int(token)] = None
    if not found and tokenizer.eos_token_id is not None:
        found[int(tokenizer.eos_token_id)] = None
    return tuple(found)


def _number(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int) or value <= 0:
        raise ModelLoadError(f"The model's config has no usable '{name}' (found {value!r}).")
    return value
