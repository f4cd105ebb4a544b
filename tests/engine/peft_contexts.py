"""Adapters of virtual tokens and of invocations by PEFT: what the engine is given, and what it must answer."""

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from peft.tuners.lora.variants import calculate_alora_offsets

from adapters_store.forms import AdapterWeights, Context, Form, LowRank

CONFIGS: dict[str, Any] = {
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "prompt-2": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=19, encoder_hidden_size=24),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=21),
    "prefix-2": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=21),
    "projected": PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=24
    ),
    "lora": LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "down_proj"]),
    "alora": LoraConfig(
        task_type="CAUSAL_LM", r=6, target_modules=["q_proj", "k_proj", "v_proj"], alora_invocation_tokens=[7, 9, 7]
    ),
    "alora-2": LoraConfig(
        task_type="CAUSAL_LM", r=6, target_modules=["q_proj", "k_proj", "v_proj"], alora_invocation_tokens=[7, 9, 7]
    ),
}


class Oracle:
    """One PEFT model for each of `names` in CONFIGS, over a base of its own, with random zero-mean weights."""

    def __init__(self, plain: Any, names: Sequence[str] = tuple(CONFIGS)) -> None:
        self._plain = plain
        self._models = {name: self._build(name, seed) for seed, name in enumerate(names)}

    @torch.inference_mode()
    def weights(self, name: str) -> AdapterWeights:
        """As an importer gives them."""
        model, config = self._models[name], CONFIGS[name]
        if isinstance(config, LoraConfig):
            return AdapterWeights(name, _low_rank(model), invocation=tuple(config.alora_invocation_tokens or ()))
        if not isinstance(config, PrefixTuningConfig):
            return AdapterWeights(name, {}, Context(embeddings=model.get_prompt(batch_size=1)[0].clone()))
        told = (
            model.active_peft_config
        )  # not from the cache that PEFT makes: one with a window keeps the last rows only
        found = model.prompt_encoder["default"](model.prompt_tokens["default"][None, : told.num_virtual_tokens])
        heads = told.num_attention_heads
        keys, values = found.view(told.num_virtual_tokens, told.num_layers, 2, heads, -1).permute(2, 1, 0, 3, 4)
        return AdapterWeights(name, {}, Context(keys=keys.clone(), values=values.clone()))

    @torch.inference_mode()
    def logits(self, name: str | None, tokens: Sequence[int], prompt: int) -> torch.Tensor:
        """Of each token, [tokens, vocabulary]; the first `prompt` of them are the prompt."""
        inputs, config = torch.tensor([list(tokens)]), CONFIGS.get(name or "")
        if name is None:
            found: torch.Tensor = self._plain(inputs, use_cache=False).logits[0]
            return found
        model, options = self._models[name], dict[str, Any]()
        if isinstance(config, LoraConfig) and config.alora_invocation_tokens:
            [offset] = calculate_alora_offsets(model.peft_config, "default", inputs[:, :prompt])
            options["alora_offsets"] = [None if offset is None else offset + len(tokens) - prompt]
        elif isinstance(config, LoraConfig):
            options["use_cache"] = False
        found = model(input_ids=inputs, **options).logits[0]
        return found[-len(tokens) :]

    def greedy(self, name: str | None, prompt: Sequence[int], count: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(name, tokens, len(prompt))[-1].argmax()))
        return tokens[len(prompt) :]

    @torch.inference_mode()
    def generate(self, name: str, prompt: Sequence[int], count: int) -> list[int]:
        """By PEFT's own `generate`, with its cache."""
        inputs = torch.tensor([list(prompt)])
        out = self._models[name].generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
        )
        return [int(token) for token in out[0, -count:]]

    def _build(self, name: str, seed: int) -> Any:
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(copy.deepcopy(self._plain), copy.deepcopy(CONFIGS[name]))
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "lora_" in parameter_name:
                    parameter.normal_(0, 0.2)
                elif "prompt_encoder" in parameter_name:
                    parameter.normal_(0, 0.5)
        return model.eval().requires_grad_(False)


def _low_rank(model: Any) -> dict[str, tuple[Form, ...]]:
    found: dict[str, tuple[Form, ...]] = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            d = torch.full((len(a),), float(module.scaling["default"]))
            found[name] = (LowRank(a.clone(), b.clone(), d),)
    return found
