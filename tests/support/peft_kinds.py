"""An adapter of every kind that PEFT makes and Polyrank serves, for the tiny Llama."""

from collections.abc import Callable, Mapping
from typing import Any

import peft
import torch
from peft.tuners.lora import config as lora

from tests.support.models import tiny_tokenizer

TARGETS = ["q_proj", "v_proj", "down_proj"]
LINEAR: Mapping[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": TARGETS}
PROMPT: Mapping[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
TEXT = "one request asks the base model and the adapter answers the question"
IDS: list[int] = tiny_tokenizer()(TEXT)["input_ids"]
INVOCATION = IDS[-6:-3]  # token ids from which on an aLoRA acts on this text
Make = Callable[[], peft.PeftConfig]


def _lora(**options: Any) -> Make:
    return lambda: peft.LoraConfig(**{**LINEAR, "r": 4, "lora_alpha": 6, **options})


def _linear(config: type, **options: Any) -> Make:
    return lambda: config(**{**LINEAR, **options})


def _prompt(config: type, **options: Any) -> Make:
    return lambda: config(**{**PROMPT, **options})


KINDS: Mapping[str, Make] = {
    "lora": _lora(),
    "rslora": _lora(use_rslora=True),
    "dora": _lora(use_dora=True),
    "alora": _lora(alora_invocation_tokens=INVOCATION),
    "qalora": _lora(use_qalora=True, qalora_group_size=8),
    "kasa": _lora(kasa_config=lora.KasaConfig()),
    "velora": _lora(velora_config=lora.VeloraConfig(num_groups=8)),
    "lora-tokens": _lora(trainable_token_indices=[3, 12, 40]),
    "adalora": _linear(peft.AdaLoraConfig, init_r=4, target_r=2, total_step=10),
    "vera": _linear(peft.VeraConfig, r=8),
    "pvera": _linear(peft.PveraConfig, r=8),
    "loha": _linear(peft.LoHaConfig, r=3),
    "lokr": _linear(peft.LoKrConfig, r=3),
    "vblora": _linear(peft.VBLoRAConfig, r=3, num_vectors=12, vector_length=16),
    "unilora": _linear(peft.UniLoraConfig, r=3),
    "tinylora": _linear(peft.TinyLoraConfig, r=3, u=5),
    "psoft": _linear(peft.PsoftConfig, r=6),
    "miss": _linear(peft.MissConfig, r=4),
    "miss-bat": _linear(peft.MissConfig, r=8, init_weights="bat"),
    "gralora": _linear(peft.GraloraConfig, r=4),
    "delora": _linear(peft.DeloraConfig, r=5),
    "hra": _linear(peft.HRAConfig, r=4),
    "peanut": _linear(peft.PeanutConfig, r=5),
    "deft": _linear(peft.DeftConfig, r=4),
    "hira": _linear(peft.HiraConfig, r=4),
    "randlora": _linear(peft.RandLoraConfig, r=5),
    "c3a": _linear(peft.C3AConfig, block_size=16),
    "frod": _linear(peft.FrodConfig, sparse_rate=0.05, progressbar=False),
    "osf": _linear(peft.OSFConfig, effective_rank=0.9),
    "ia3": _linear(peft.IA3Config, feedforward_modules=["down_proj"]),
    "oft": _linear(peft.OFTConfig, oft_block_size=8, r=0),
    "boft": _linear(peft.BOFTConfig, boft_block_size=8, boft_n_butterfly_factor=1),
    "road": _linear(peft.RoadConfig, group_size=16),
    "shira": _linear(peft.ShiraConfig, r=4),
    "supertuning": _linear(peft.SupertuningConfig),
    "fourierft": _linear(peft.FourierFTConfig, n_frequency=40),
    "waveft": _linear(peft.WaveFTConfig, n_frequency=40),
    "glora": _linear(peft.GloraConfig),
    "beft": _linear(peft.BeftConfig, target_modules=["v_proj"]),
    "ln-tuning": _linear(peft.LNTuningConfig, target_modules=["input_layernorm", "norm"]),
    "trainable-tokens": lambda: peft.TrainableTokensConfig(
        task_type="CAUSAL_LM", target_modules=["embed_tokens"], token_indices=[2, 7, 30]
    ),
    "prompt-tuning": _prompt(peft.PromptTuningConfig),
    "p-tuning": _prompt(peft.PromptEncoderConfig, encoder_hidden_size=16),
    "prefix-tuning": _prompt(peft.PrefixTuningConfig),
}


def change(name: str, parameter: torch.Tensor) -> None:
    """Away from the start: zero-mean noise on what is there, small enough that text stays text."""
    parameter.add_(torch.randn_like(parameter) * (0.02 if "prompt" in name else 0.2))
