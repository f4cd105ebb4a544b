"""Strict reading of PEFT's adapter_config.json: every field known, nothing imported, no path followed.

Fields: `LoraConfig` of PEFT 0.21.2. Newer releases write further fields; such a field is accepted only while it is
switched off (null, false, {} or []), since a feature that is on and ignored would serve wrong output.
"""

import json
from typing import Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, ValidationError

from adapters_store.canonical import shorten
from adapters_store.errors import AdapterInvalid

MAX_PATTERN = 4096  # characters of one regular expression


class PeftConfig(BaseModel):
    """adapter_config.json of a LoRA, as far as it can be served."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow", allow_inf_nan=False)

    peft_type: str
    task_type: str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    r: int = 8
    lora_alpha: float = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    use_rslora: bool | None = False
    lora_bias: bool | None = False
    fan_in_fan_out: bool | None = False
    ensure_weight_tying: bool | None = False

    lora_dropout: float | None = 0.0
    init_lora_weights: bool | str | None = True
    loftq_config: dict[str, Any] | None = None
    eva_config: dict[str, Any] | None = None
    corda_config: dict[str, Any] | None = None
    lora_ga_config: dict[str, Any] | None = None
    runtime_config: dict[str, Any] | None = None
    qalora_group_size: int | None = 16
    megatron_core: str | None = None

    bias: Literal["none", "all", "lora_only"] = "none"
    use_dora: bool | None = False
    use_qalora: bool | None = False
    use_bdlora: dict[str, Any] | bool | None = None
    alora_invocation_tokens: list[int] | None = None
    arrow_config: dict[str, Any] | None = None
    kasa_config: dict[str, Any] | None = None
    velora_config: dict[str, Any] | None = None
    monteclora_config: dict[str, Any] | None = None
    layer_replication: list[list[int]] | None = None
    megatron_config: dict[str, Any] | None = None
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None


# refused while it holds anything but null, false or empty: it changes what the model computes
_UNSERVED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
# these train against a base from which the adapter's start was subtracted; on the original base they are wrong
_RESIDUAL_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica")


def parse(data: bytes, max_bytes: int) -> PeftConfig:
    """The checked config.

    Raises AdapterInvalid: `bad_config` where it is malformed, `rank_limit` for a rank below 1,
    `feature_unsupported`, naming every such feature, where it needs what is not served.
    """
    if len(data) > max_bytes:
        _bad(f"is {len(data)} bytes long; the limit is {max_bytes}")
    try:
        fields = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError):
        _bad("is not a JSON object (NaN, duplicate keys and deep nesting are refused)")
    if not isinstance(fields, dict):
        _bad("is not a JSON object")
    if "peft_type" not in fields:
        _bad("lacks `peft_type`: is this PEFT's adapter_config.json?", "peft_type")
    if fields["peft_type"] != "LORA":
        _unsupported([f"peft_type {shorten(str(fields['peft_type']), 40)}"])
    try:
        config = PeftConfig.model_validate(fields)
    except (ValidationError, RecursionError) as error:
        _bad(_first_error(error))
    _check_unknown(config)
    _check_values(config)
    if features := _unserved(config):
        _unsupported(features)
    return config


def _check_unknown(config: PeftConfig) -> None:
    for key, value in (config.model_extra or {}).items():
        if value is not None and value is not False and value != {} and value != []:
            _bad(f"has the unknown field `{shorten(key, 60)}`, which may change the result", shorten(key, 60))


def _check_values(config: PeftConfig) -> None:
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    if min(ranks) < 1:
        raise AdapterInvalid(f"adapter_config.json has rank {min(ranks)}; ranks start at 1.", code="rank_limit")
    if not config.target_modules:
        _bad("has no `target_modules`; write the list of modules that the adapter changes", "target_modules")
    if isinstance(config.target_modules, str) and (config.layers_to_transform is not None or config.layers_pattern):
        _bad("cannot hold `layers_to_transform` or `layers_pattern` beside a regex in `target_modules`")
    if config.layers_pattern and config.layers_to_transform is None:
        _bad("has `layers_pattern` without `layers_to_transform`", "layers_pattern")
    if (config.corda_config or {}).get("cache_file") or (config.corda_config or {}).get("covariance_file"):
        _bad("names a file in `corda_config`; no path is ever read", "corda_config")
    patterns = [config.target_modules, config.exclude_modules, config.layers_pattern]
    texts = [text for pattern in patterns for text in ([pattern] if isinstance(pattern, str) else pattern or [])]
    texts += [*(config.rank_pattern or {}), *(config.alpha_pattern or {}), *(config.modules_to_save or [])]
    if any(len(text) > MAX_PATTERN for text in texts):
        _bad(f"has a pattern of more than {MAX_PATTERN} characters")
    if any(not text.isprintable() for text in texts):
        _bad("has a pattern with control characters")


def _unserved(config: PeftConfig) -> list[str]:
    found = [name for name in _UNSERVED if getattr(config, name) not in (None, False, {}, [])]
    if config.auto_mapping and not _names_transformers(config.auto_mapping):
        found.append("auto_mapping to a class outside transformers")
    if config.bias != "none":
        found.append(f'bias "{config.bias}"')
    if config.task_type not in (None, "CAUSAL_LM"):
        found.append(f"task_type {shorten(config.task_type, 40)}")
    init = config.init_lora_weights
    if isinstance(init, str):
        if init.lower().startswith(_RESIDUAL_INITS):
            found.append(
                f'init_lora_weights "{shorten(init, 40)}" (trained over a changed base; save it with '
                "`save_pretrained(..., path_initial_model_for_weight_conversion=...)`, which makes a plain LoRA)"
            )
        elif init.lower() not in _HARMLESS_INITS:
            found.append(f'init_lora_weights "{shorten(init, 40)}"')
    return found


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


def _bad(problem: str, param: str = "config") -> NoReturn:
    raise AdapterInvalid(f"adapter_config.json {problem}.", code="bad_config", param=param)


def _unsupported(features: list[str]) -> NoReturn:
    raise AdapterInvalid(
        f"The adapter needs what this server does not serve yet: {'; '.join(features)}.",
        code="feature_unsupported",
        param="config",
    )
