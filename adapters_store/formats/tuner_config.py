"""Strict reading of PEFT's adapter_config.json, whatever the method: every field known, nothing imported, no path
followed.

Newer releases write further fields; such a field is accepted only while it is switched off (null, false, {} or []),
since a feature that is on and ignored would serve wrong output.
"""

import json
from collections.abc import Iterable
from typing import Any, ClassVar, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from adapters_store.canonical import shorten
from adapters_store.errors import AdapterInvalid

MAX_NUMBER = 1e30  # beyond it scales overflow float32, and products of them
MAX_PATTERN = 4096  # characters of one regular expression
Config = TypeVar("Config", bound="CommonConfig")


class CommonConfig(BaseModel):
    """What every adapter_config.json has."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow", allow_inf_nan=False)

    peft_type: str
    task_type: str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False


class TunerConfig(CommonConfig):
    """Of a method that changes modules: which ones. least_rank: what `r` may be, where it is no plain rank."""

    least_rank: ClassVar[int] = 1

    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    fan_in_fan_out: bool | None = False


def read_fields(data: bytes, max_bytes: int) -> dict[str, Any]:
    """The fields as they are written, `peft_type` among them. Raises AdapterInvalid `bad_config`."""
    if len(data) > max_bytes:
        bad(f"is {len(data)} bytes long; the limit is {max_bytes}")
    try:
        fields = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError):
        bad("is not a JSON object (NaN, duplicate keys and deep nesting are refused)")
    if not isinstance(fields, dict):
        bad("is not a JSON object")
    if "peft_type" not in fields:
        bad("lacks `peft_type`: is this PEFT's adapter_config.json?", "peft_type")
    for key, value in fields.items():
        if (largest := _largest(value)) is not None and largest > MAX_NUMBER:
            bad(f"has a number beyond {MAX_NUMBER:g} in `{shorten(key, 60)}`", shorten(key, 60))
    return fields


def validate(fields: dict[str, Any], model: type[Config]) -> Config:
    """The checked config. Raises AdapterInvalid: `bad_config`, or `rank_limit` for a rank below 1."""
    try:
        config = model.model_validate(fields)
    except (ValidationError, RecursionError) as error:
        bad(_first_error(error))
    for key, value in (config.model_extra or {}).items():
        if value is not None and value is not False and value != {} and value != []:
            bad(f"has the unknown field `{shorten(key, 60)}`, which may change the result", shorten(key, 60))
    if isinstance(config, TunerConfig):
        _check_tuner(config)
    return config


def unserved(config: CommonConfig) -> list[str]:
    """Features common to all methods that are on and cannot be served."""
    found = []
    if config.auto_mapping and not _names_transformers(config.auto_mapping):
        found.append("auto_mapping to a class outside transformers")
    if config.task_type not in (None, "CAUSAL_LM"):
        found.append(f"task_type {shorten(config.task_type, 40)}")
    return found


def bad(problem: str, param: str = "config") -> NoReturn:
    raise AdapterInvalid(f"adapter_config.json {problem}.", code="bad_config", param=param)


def unsupported(features: list[str]) -> NoReturn:
    raise AdapterInvalid(
        f"The adapter needs what this server does not serve: {'; '.join(features)}.",
        code="feature_unsupported",
        param="config",
    )


def _check_tuner(config: TunerConfig) -> None:
    ranks = _ranks([config.r, *(config.rank_pattern or {}).values()])
    if min(ranks, default=config.least_rank) < config.least_rank:
        problem = f"adapter_config.json has rank {min(ranks)}; ranks start at {config.least_rank}."
        raise AdapterInvalid(problem, code="rank_limit")
    if not config.target_modules:
        bad("has no `target_modules`; write the list of modules that the adapter changes", "target_modules")
    if isinstance(config.target_modules, str) and (config.layers_to_transform is not None or config.layers_pattern):
        bad("cannot hold `layers_to_transform` or `layers_pattern` beside a regex in `target_modules`")
    if config.layers_pattern and config.layers_to_transform is None:
        bad("has `layers_pattern` without `layers_to_transform`", "layers_pattern")
    patterns = [config.target_modules, config.exclude_modules, config.layers_pattern]
    texts = [text for pattern in patterns for text in ([pattern] if isinstance(pattern, str) else pattern or [])]
    texts += [*(config.rank_pattern or {}), *(config.alpha_pattern or {}), *(config.modules_to_save or [])]
    if any(len(text) > MAX_PATTERN for text in texts):
        bad(f"has a pattern of more than {MAX_PATTERN} characters")
    if any(not text.isprintable() for text in texts):
        bad("has a pattern with control characters")


def _largest(value: Any) -> float | int | None:
    """The largest magnitude of a number inside a value, whose nesting the parser has bounded."""
    if isinstance(value, dict | list):
        inside = value.values() if isinstance(value, dict) else value
        return max((found for item in inside if (found := _largest(item)) is not None), default=None)
    return abs(value) if isinstance(value, int | float) else None


def _ranks(found: Iterable[Any]) -> list[int]:
    """AdaLoRA writes lists in its pattern, of what was kept; Super-Tuning null where there is no LoRA."""
    return [rank for rank in found if isinstance(rank, int)]


def _names_transformers(mapping: dict[str, Any]) -> bool:
    """PEFT writes the base model's class here when no `task_type` was given. It is read, and never imported."""
    library = mapping.get("parent_library")
    known = mapping.keys() <= {"base_model_class", "parent_library"}
    return known and isinstance(library, str) and library.startswith("transformers.models.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("duplicate key")
    return made


def _refuse(_: str) -> NoReturn:
    raise ValueError("NaN or infinity")


def _first_error(error: ValidationError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"field `{shorten('.'.join(map(str, first['loc'])), 60)}`: {shorten(first['msg'])}"
