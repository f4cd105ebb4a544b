"""OpenAI's sampling fields as the engine's SamplingParams."""

import json
import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from server.api.schemas.sampling import MAX_SEED, OpenAISampling, ResponseFormat
from server.engine.request import Grammar, SamplingParams
from server.errors import InvalidRequest

MAX_SCHEMA_CHARS = 64 << 10
MAX_PATTERN_CHARS = 16 << 10


def base_seed(seed: int | None) -> int:
    """The caller's seed, or a fresh one, as a non-negative number."""
    return secrets.randbelow(MAX_SEED) if seed is None else seed & MAX_SEED


def with_seeds(sampling: SamplingParams, seed: int | None, count: int) -> list[SamplingParams]:
    """One SamplingParams per choice: seeds follow each other, so choice i alone can be had again with seed + i."""
    first = base_seed(seed)
    return [replace(sampling, seed=(first + i) & MAX_SEED) for i in range(count)]


def sampling_params(body: OpenAISampling, *, vocabulary: int, max_tokens: int | None) -> SamplingParams:
    """Everything but seeds and log probabilities."""
    minimum = body.min_tokens or 0
    if max_tokens is not None and minimum > max_tokens:
        raise InvalidRequest(f"min_tokens ({minimum}) is more than max_tokens ({max_tokens}).", param="min_tokens")
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=minimum,
        temperature=_or(body.temperature, 1.0),
        top_k=max(0, body.top_k or 0),
        top_p=_or(body.top_p, 1.0),
        min_p=_or(body.min_p, 0.0),
        typical_p=_or(body.typical_p, 1.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        logit_bias=logit_bias(body.logit_bias, vocabulary),
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        stop_token_ids=tuple(check_tokens(body.stop_token_ids or [], vocabulary, "stop_token_ids")),
        include_stop=bool(body.include_stop_str_in_output),
        ignore_eos=bool(body.ignore_eos),
        truncate=body.truncate_prompt_tokens,
        grammar=response_grammar(body.response_format),
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def logit_bias(bias: Mapping[str, float] | None, vocabulary: int) -> dict[int, float]:
    """OpenAI's JSON has token ids as text keys."""
    found: dict[int, float] = {}
    for key, value in (bias or {}).items():
        if not (key.isascii() and key.isdecimal() and len(key) < 12) or int(key) >= vocabulary:
            text = f"logit_bias has a key that is no token id below {vocabulary}."
            raise InvalidRequest(text, param="logit_bias")
        found[int(key)] = value
    return found


def check_tokens(tokens: list[int], vocabulary: int, field: str) -> list[int]:
    if tokens and not (min(tokens) >= 0 and max(tokens) < vocabulary):
        text = f"{field} has a token id outside the vocabulary of {vocabulary}."
        raise InvalidRequest(text, param=field)
    return tokens


def response_grammar(response_format: ResponseFormat | None) -> Grammar | None:
    if response_format is None or response_format.type == "text":
        return None
    schema = response_format.schema_ or response_format.value or {"type": "object"}
    if response_format.type == "json_schema":
        if response_format.json_schema is None or response_format.json_schema.schema_ is None:
            text = "response_format of type json_schema needs json_schema.schema."
            raise InvalidRequest(text, param="response_format.json_schema.schema")
        schema = response_format.json_schema.schema_
    return schema_grammar(schema, "response_format")


def schema_grammar(schema: Mapping[str, Any], field: str) -> Grammar:
    source = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    if len(source) > MAX_SCHEMA_CHARS:
        text = f"The JSON schema is longer than {MAX_SCHEMA_CHARS} characters."
        raise InvalidRequest(text, code="invalid_schema", param=field)
    return Grammar("json_schema", source)
