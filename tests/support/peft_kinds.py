"""An adapter of every kind that PEFT makes and Polyrank serves, for three tiny models."""

from collections.abc import Mapping, Sequence
from typing import Any

import peft
import torch
from peft.tuners.lora import config as lora

from tests.support.models import tiny_tokenizer

TEXT = "one request asks the base model and the adapter answers the question"
IDS: list[int] = tiny_tokenizer()(TEXT)["input_ids"]
INVOCATION = IDS[-6:-3]  # token ids from which on an aLoRA acts on this text

TARGETS: Mapping[str, Sequence[str]] = {
    "llama": ("q_proj", "v_proj", "down_proj"),
    "qwen2": ("k_proj", "v_proj", "up_proj", "down_proj"),
    "gpt2": ("c_attn", "mlp.c_proj"),
}
_EMBEDDING = {"llama": "embed_tokens", "qwen2": "embed_tokens", "gpt2": "wte"}
_NORMS = {"llama": ["input_layernorm", "norm"], "qwen2": ["post_attention_layernorm"], "gpt2": ["ln_1", "ln_f"]}
_VALUES = {"llama": "v_proj", "qwen2": "v_proj", "gpt2": "c_attn"}
_FEEDFORWARD = {"llama": "down_proj", "qwen2": "down_proj", "gpt2": "mlp.c_proj"}

_LORA: Mapping[str, Any] = {"r": 4, "lora_alpha": 6}
_PROMPT: Mapping[str, Any] = {"num_virtual_tokens": 5}
_KINDS: Mapping[str, tuple[type[peft.PeftConfig], Mapping[str, Any]]] = {
    "lora": (peft.LoraConfig, _LORA),
    "rslora": (peft.LoraConfig, {**_LORA, "use_rslora": True}),
    "dora": (peft.LoraConfig, {**_LORA, "use_dora": True}),
    "alora": (peft.LoraConfig, {**_LORA, "alora_invocation_tokens": INVOCATION}),
    "qalora": (peft.LoraConfig, {**_LORA, "use_qalora": True, "qalora_group_size": 8}),
    "kasa": (peft.LoraConfig, {**_LORA, "kasa_config": lora.KasaConfig()}),
    "velora": (peft.LoraConfig, {**_LORA, "velora_config": lora.VeloraConfig(num_groups=8)}),
    "lora-tokens": (peft.LoraConfig, {**_LORA, "trainable_token_indices": [3, 12, 40]}),
    "adalora": (peft.AdaLoraConfig, {"init_r": 4, "target_r": 2, "total_step": 10}),
    "vera": (peft.VeraConfig, {"r": 8}),
    "pvera": (peft.PveraConfig, {"r": 8}),
    "loha": (peft.LoHaConfig, {"r": 3}),
    "lokr": (peft.LoKrConfig, {"r": 3}),
    "vblora": (peft.VBLoRAConfig, {"r": 3, "num_vectors": 12, "vector_length": 16}),
    "unilora": (peft.UniLoraConfig, {"r": 3}),
    "tinylora": (peft.TinyLoraConfig, {"r": 3, "u": 5}),
    "psoft": (peft.PsoftConfig, {"r": 6}),
    "miss": (peft.MissConfig, {"r": 4}),
    "miss-bat": (peft.MissConfig, {"r": 8, "init_weights": "bat"}),
    "gralora": (peft.GraloraConfig, {"r": 4}),
    "delora": (peft.DeloraConfig, {"r": 5}),
    "hra": (peft.HRAConfig, {"r": 4}),
    "peanut": (peft.PeanutConfig, {"r": 5}),
    "deft": (peft.DeftConfig, {"r": 4}),
    "hira": (peft.HiraConfig, {"r": 4}),
    "randlora": (peft.RandLoraConfig, {"r": 5}),
    "c3a": (peft.C3AConfig, {"block_size": 16}),
    "frod": (peft.FrodConfig, {"sparse_rate": 0.05, "progressbar": False}),
    "osf": (peft.OSFConfig, {"effective_rank": 0.9}),
    "poly": (peft.PolyConfig, {"r": 4, "n_tasks": 1, "n_skills": 2}),
    "ia3": (peft.IA3Config, {}),
    "oft": (peft.OFTConfig, {"oft_block_size": 8, "r": 0}),
    "boft": (peft.BOFTConfig, {"boft_block_size": 8, "boft_n_butterfly_factor": 1}),
    "road": (peft.RoadConfig, {"group_size": 16}),
    "shira": (peft.ShiraConfig, {"r": 4}),
    "supertuning": (peft.SupertuningConfig, {}),
    "fourierft": (peft.FourierFTConfig, {"n_frequency": 40}),
    "waveft": (peft.WaveFTConfig, {"n_frequency": 40}),
    "glora": (peft.GloraConfig, {}),
    "beft": (peft.BeftConfig, {}),
    "ln-tuning": (peft.LNTuningConfig, {}),
    "trainable-tokens": (peft.TrainableTokensConfig, {"token_indices": [2, 7, 30]}),
    "prompt-tuning": (peft.PromptTuningConfig, _PROMPT),
    "p-tuning": (peft.PromptEncoderConfig, {**_PROMPT, "encoder_hidden_size": 16}),
    "prefix-tuning": (peft.PrefixTuningConfig, _PROMPT),
}
_WITHOUT_TARGETS = frozenset({"prompt-tuning", "p-tuning", "prefix-tuning"})
# What PEFT does not make of GPT-2's Conv1D.
_LINEAR_ALONE = frozenset(
    (
        *("kasa", "loha", "lokr", "psoft", "miss", "miss-bat", "delora", "hra", "peanut", "c3a", "osf", "poly", "oft"),
        *("boft", "road", "shira", "supertuning", "glora", "beft"),
    )
)


def kinds(architecture: str) -> list[str]:
    """Those that there are for one of `TARGETS`."""
    return [kind for kind in _KINDS if architecture != "gpt2" or kind not in _LINEAR_ALONE]


def config(kind: str, architecture: str, targets: Sequence[str] = (), **options: Any) -> peft.PeftConfig:
    """targets: in place of `TARGETS`; options: of PEFT's config."""
    make, own = _KINDS[kind]
    found: dict[str, Any] = {"task_type": "CAUSAL_LM", **own, **options}
    if kind not in _WITHOUT_TARGETS:
        found["target_modules"] = list(targets or TARGETS[architecture])
    if kind == "trainable-tokens":
        found["target_modules"] = [_EMBEDDING[architecture]]
    elif kind == "ln-tuning":
        found["target_modules"] = _NORMS[architecture]
    elif kind == "beft":
        found["target_modules"] = [_VALUES[architecture]]
    elif kind == "ia3":
        found["feedforward_modules"] = [_FEEDFORWARD[architecture]]
    return make(**found)


def change(name: str, parameter: torch.Tensor) -> None:
    """Away from the start: zero-mean noise on what is there, small enough that text stays text."""
    parameter.add_(torch.randn_like(parameter) * (0.02 if "prompt" in name else 0.2))
