"""Fields that would change the answer and are not read: refused, as an answer without them would be a wrong one.

Every other unknown field is ignored, as it can only be a hint (user, metadata, store, service_tier, priority, ...).
"""

import difflib
from collections.abc import Collection, Container, Mapping
from typing import Any

from server.errors import InvalidRequest

# What other servers call the adapter, or what is right in another place of the request.
MISNAMED = (
    "adapter",
    "adapter_id",
    "adapter_name",
    "adapters",
    "lora",
    "lora_id",
    "lora_name",
    "lora_path",
    "lora_request",
    "merged_adapters",
    "model",
)

MOST_FIELDS = 64

# What we do not have. A neutral value (null, false, 0, "", [], "none") passes.
UNSUPPORTED = {
    "tools": "tool calling",
    "tool_choice": "tool calling",
    "functions": "tool calling",
    "function_call": "tool calling",
    "suffix": "text insertion",
    "use_beam_search": "beam search",
    "length_penalty": "beam search",
    "prompt_embeds": "prompts as tensors",
    "chat_template": "chat templates from requests",
    "chat_template_kwargs": "chat templates from requests",
    "continue_final_message": "continuing the last message",
    "documents": "documents",
    "audio": "audio",
    "guided_json": "guided_json (use response_format)",
    "guided_regex": "guided_regex (use `grammar` of /generate)",
    "guided_choice": "guided_choice (use response_format with an enum)",
    "guided_grammar": "guided_grammar",
    "structured_outputs": "structured_outputs (use response_format)",
    "bad_words": "bad_words (use logit_bias)",
    "allowed_token_ids": "allowed_token_ids (use logit_bias)",
    "return_tokens_as_token_ids": "tokens shown as ids",
    "prompt_logprobs": "prompt_logprobs (use echo with logprobs)",
    "echo": "echo in a chat",
    "best_of": "best_of in a chat (use n)",
}
NEUTRAL = (("tool_choice", "auto"), ("length_penalty", 1.0))


def refuse_misnamed(given: Mapping[str, Any], known: Container[str], right: str, prefix: str = "") -> None:
    """known: the names that are read there; right: where the adapter belongs, in words."""
    for name in MISNAMED:
        if name not in known and given.get(name) is not None:
            text = f"`{prefix}{name}` is not read, and without it you would get another model. Use {right}."
            raise InvalidRequest(text, param=prefix + name)


def refuse_misspelt(given: Mapping[str, Any], known: Collection[str], likeness: float, prefix: str = "") -> None:
    """A name that is nearly one we read is a slip of the pen, and without it the answer would be another one.

    likeness: difflib's ratio from which on two names are near, 0 to 1.
    """
    if len(given) > MOST_FIELDS:  # comparing costs about 20 us a name; nobody writes so many by hand
        return
    for name in given:
        if name in known or len(name) > MOST_FIELDS or given[name] is None:
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=likeness)
        if near and near[0] not in given:
            text = f"There is no field `{prefix}{name}`. Did you mean `{prefix}{near[0]}`?"
            raise InvalidRequest(text, code="unknown_parameter", param=prefix + name)


def refuse_unsupported(given: Mapping[str, Any], known: Container[str], unsupported: Mapping[str, str]) -> None:
    for name, feature in unsupported.items():
        value = given.get(name)
        if name not in known and value and value != "none" and (name, value) not in NEUTRAL:
            text = f"Not supported: {feature}. Leave `{name}` out."
            raise InvalidRequest(text, code="unsupported_parameter", param=name)
