"""Prompt tuning and its kin: virtual tokens before the prompt, as embeddings or as what the cache holds of them.

PEFT saves what its encoders give (`PeftModel.get_prompt_embedding_to_save`), so how they were trained does not matter.
"""

from typing import Any

import torch

from adapters_store.canonical import shorten
from adapters_store.errors import AdapterInvalid
from adapters_store.formats.method import AdapterFile, Method, Shapes
from adapters_store.formats.tuner_config import CommonConfig, bad, unsupported
from adapters_store.forms import Context
from adapters_store.variants import Knobs

_EMBEDDINGS, _COLUMNS, _ROWS = "prompt_embeddings", "prefix_task_cols", "prefix_task_rows"


class PromptConfig(CommonConfig):
    """What every prompt method has. num_attention_heads and token_dim are those of the keys in prefix tuning."""

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None


class PromptTuningConfig(PromptConfig):
    """adapter_config.json of PEFT 0.21.2. Where the embeddings started does not matter any more."""

    prompt_tuning_init: str | None = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None


class PromptEncoderConfig(PromptConfig):
    """adapter_config.json of PEFT 0.21.2."""

    encoder_reparameterization_type: str = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0


class MultitaskConfig(PromptTuningConfig):
    """adapter_config.json of PEFT 0.21.2."""

    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int | None = 0
    num_ranks: int = 1
    num_tasks: int = 1


class CptConfig(PromptConfig):
    """adapter_config.json of PEFT 0.21.2. All of it was for training."""

    cpt_token_ids: list[int] | None = None
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[int] | None = None
    opt_weighted_loss_type: str | None = "none"
    opt_loss_decay_factor: float | None = 1.0
    opt_projection_epsilon: float | None = 0.1
    opt_projection_format_epsilon: float | None = 0.1
    tokenizer_name_or_path: str | None = None


class PrefixTuningConfig(PromptConfig):
    """adapter_config.json of PEFT 0.21.2. A projection was applied before the file was saved."""

    init_weights: str | bool | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False


class CartridgeConfig(PromptConfig):
    """adapter_config.json of PEFT 0.21.2."""

    num_frozen_tokens: int = 1


def _check(config: PromptConfig) -> None:
    if (config.num_virtual_tokens or 0) < 1:
        bad("has no `num_virtual_tokens`", "num_virtual_tokens")
    features = [f"modules_to_save `{shorten(name, 60)}`" for name in config.modules_to_save or []]
    if config.num_transformer_submodules not in (None, 1):
        features.append("num_transformer_submodules other than 1")
    if features:
        unsupported(features)


def _check_multitask(config: MultitaskConfig) -> None:
    _check(config)
    if min(config.num_tasks, config.num_ranks) < 1:
        bad("has no task or no rank", "num_tasks")


def _embeddings(file: AdapterFile) -> Shapes:
    base, config = file.base, file.config
    if base.input_embedding not in base.modules:
        unsupported(["virtual tokens (the base's embedding is none that this server knows)"])
    width = base.modules[base.input_embedding].out_features
    if config.token_dim not in (None, width):
        _mismatch(f"virtual tokens of length {config.token_dim}; the base's have {width}")
    return {_EMBEDDINGS: (config.num_virtual_tokens, width)}


def _multitask(file: AdapterFile) -> Shapes:
    config, found = file.config, _embeddings(file)
    count, width = found[_EMBEDDINGS]
    tasks, ranks = config.num_tasks, config.num_ranks
    return {**found, _COLUMNS: (tasks, count, ranks), _ROWS: (tasks, ranks, width)}


def _prefix(file: AdapterFile) -> Shapes:
    config, kv = file.config, file.base.kv
    if kv is None:
        unsupported(["a prefix of keys and values (this base does not tell their shape)"])
    layers, heads, size = kv
    for name, told, ours in (
        ("layers", config.num_layers, layers),
        ("key-value heads", config.num_attention_heads, heads),
        ("numbers in a key of all heads", config.token_dim, heads * size),
    ):
        if told not in (None, ours):
            _mismatch(f"{told} {name}; the base has {ours}")
    return {_EMBEDDINGS: (config.num_virtual_tokens, layers * 2 * heads * size)}


def _mismatch(problem: str) -> None:
    raise AdapterInvalid(
        f"The adapter has {problem}. It was trained on another model.", code="base_mismatch", param="config"
    )


def _prompt(file: AdapterFile) -> Context:
    return Context(file.tensor(_EMBEDDINGS))


def _prompt_of_task(file: AdapterFile) -> Context:
    """The shared prompt times the task's own low-rank matrix, number by number."""
    task = file.variant.task or 0
    own = file.tensor(_COLUMNS)[task] @ file.tensor(_ROWS)[task]
    return Context(file.tensor(_EMBEDDINGS) * own)


def _tasks(file: AdapterFile) -> Knobs:
    return {"task": {"count": file.config.num_tasks}} if file.config.num_tasks > 1 else {}


def _keys_and_values(file: AdapterFile) -> Context:
    """A token's row is, layer by layer, its key and then its value, all heads of each (`PeftModel.get_prompt`)."""
    assert file.base.kv is not None
    layers, heads, size = file.base.kv
    rows = file.tensor(_EMBEDDINGS).view(-1, layers, 2, heads, size)
    keys, values = (part.contiguous() for part in torch.unbind(rows.transpose(0, 1), 2))
    return Context(None, keys, values)


def _method(kind: str, config: type[PromptConfig], note: str, source: str, **more: Any) -> Method:
    options: dict[str, Any] = {"common": _embeddings, "context": _prompt, "check": _check, **more}
    parts = frozenset({_EMBEDDINGS, _COLUMNS, _ROWS} if kind == "multitask_prompt_tuning" else {_EMBEDDINGS})
    return Method(kind, kind.upper(), config, "native", note, source, common_parts=parts, **options)


_PROMPT = "Virtual tokens before the prompt, by their embeddings."
_PREFIX = "Virtual tokens before the prompt, by their keys and values in every layer."
_CACHED = {"common": _prefix, "context": _keys_and_values}
_BY_TASK = {"common": _multitask, "context": _prompt_of_task, "check": _check_multitask, "knobs": _tasks}

METHODS = (
    _method("prompt_tuning", PromptTuningConfig, _PROMPT, "arXiv 2104.08691"),
    _method("p_tuning", PromptEncoderConfig, _PROMPT, "arXiv 2103.10385"),
    _method("multitask_prompt_tuning", MultitaskConfig, f"{_PROMPT[:-1]}, of a task.", "arXiv 2303.02861", **_BY_TASK),
    _method("cpt", CptConfig, _PROMPT, "arXiv 2410.17222"),
    _method("prefix_tuning", PrefixTuningConfig, _PREFIX, "arXiv 2101.00190", **_CACHED),
    _method("cartridge", CartridgeConfig, _PREFIX, "arXiv 2506.06266", **_CACHED),
)
