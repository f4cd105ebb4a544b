"""What can be told of an architecture before it runs."""

import inspect
from typing import Any

from server.model.errors import ModelLoadError

_LAYER_KINDS = {"full_attention", "sliding_attention"}
_ARGUMENTS = {"position_ids", "logits_to_keep"}


def check_architecture(model: Any) -> None:
    """Raise `ModelLoadError` for a transformers model whose attention cannot be paged or whose rows cannot be batched.

    What shows only in a forward (sinks, position bias, uneven layers) is found by `server.model.verify`.
    """
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ModelLoadError(f"{name} has cross attention; only decoder-only models can be served.")
    if not model._can_set_attn_implementation():
        raise ModelLoadError(f"{name} has attention code of its own (ALiBi?), which cannot be paged.")
    if others := set(getattr(config, "layer_types", None) or ()) - _LAYER_KINDS:
        raise ModelLoadError(f"{name} has layers of kind {', '.join(sorted(others))}, which are not supported.")
    if missing := _ARGUMENTS - inspect.signature(model.forward).parameters.keys():
        raise ModelLoadError(f"{name} does not take {', '.join(sorted(missing))}, so its rows cannot be batched.")
