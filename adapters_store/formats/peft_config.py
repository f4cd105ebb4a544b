"""adapter_config.json of a LoRA. Fields: `LoraConfig` of PEFT 0.21.2."""

from collections.abc import Collection
from typing import Any, Literal

from adapters_store.canonical import shorten
from adapters_store.formats.tuner_config import TunerConfig, bad, read_fields, unserved, unsupported, validate


class PeftConfig(TunerConfig):
    """adapter_config.json of a LoRA of any variant."""

    lora_alpha: float = 8
    use_rslora: bool | None = False
    lora_bias: bool | None = False
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
_WHY = {"arrow_config": " (its router mixes other adapters, which one upload does not hold)"}
# these train against a base from which the adapter's start was subtracted; on the original base they are wrong
_RESIDUAL_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica")


def parse(data: bytes, max_bytes: int) -> PeftConfig:
    """The checked config.

    Raises AdapterInvalid: `bad_config` where it is malformed, `rank_limit` for a rank below 1,
    `feature_unsupported`, naming every such feature, where it needs what is not served.
    """
    fields = read_fields(data, max_bytes)
    if fields["peft_type"] != "LORA":
        unsupported([f"peft_type {shorten(str(fields['peft_type']), 40)}"])
    config = validate(fields, PeftConfig)
    if (config.corda_config or {}).get("cache_file") or (config.corda_config or {}).get("covariance_file"):
        bad("names a file in `corda_config`; no path is ever read", "corda_config")
    if features := unserved_features(config):
        unsupported(features)
    return config


def unserved_features(config: PeftConfig, served: Collection[str] = ()) -> list[str]:
    """What is on of a LoRA's config and cannot be served. served: fields of it that the caller knows how to serve."""
    refused = [name for name in _UNSERVED if name not in served]
    found = [name + _WHY.get(name, "") for name in refused if getattr(config, name) not in (None, False, {}, [])]
    found += unserved(config)
    if config.bias != "none":
        found.append(f'bias "{config.bias}"')
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
