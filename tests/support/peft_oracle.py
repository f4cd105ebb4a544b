"""Hugging Face and PEFT in float32: what every answer must equal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def random_lora(folder: Path, model: Any, seed: int, *, scale: float = 0.05, **options: Any) -> Path:
    """Save a PEFT LoRA for `model` with random zero-mean factors; `options` go to LoraConfig. `model` is not changed.

    Saved heads and biases are randomised too, so that dropping any part of the adapter shows.
    """
    options = {"target_modules": list(ALL_LINEAR), "task_type": "CAUSAL_LM", **options}
    torch.manual_seed(seed)
    peft_model = get_peft_model(_copy(model), LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, parameter.shape[-1] ** -0.5 if "lora_A" in name else scale)
            elif "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * scale)
    peft_model.save_pretrained(folder)
    return folder


class PeftOracle:
    """Greedy generation and log probabilities of one prompt at a time, by PEFT's own arithmetic."""

    def __init__(self, model: Any, folders: dict[str, Path]) -> None:
        self._model = model
        self._folders = folders
        self._adapted: dict[tuple[tuple[str, float], ...], Any] = {}

    @torch.inference_mode()
    def greedy(
        self, prompt: Sequence[int], adapters: tuple[tuple[str, float], ...], new_tokens: int, eos: Sequence[int] = ()
    ) -> tuple[list[int], list[float]]:
        """Tokens (up to and with an end token) and their log probabilities; the prefix is recomputed each time."""
        model = self._adapt(adapters)
        tokens, logprobs = list(prompt), []
        for _ in range(new_tokens):
            row = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].log_softmax(dim=-1)
            tokens.append(int(row.argmax()))
            logprobs.append(float(row[tokens[-1]]))
            if tokens[-1] in eos:
                break
        return tokens[len(prompt) :], logprobs

    @torch.inference_mode()
    def logprobs(self, tokens: Sequence[int], adapters: tuple[tuple[str, float], ...]) -> torch.Tensor:
        """Log probabilities [positions, vocabulary] of what follows each token."""
        logits: torch.Tensor = self._adapt(adapters)(torch.tensor([list(tokens)]), use_cache=False).logits[0]
        return logits.log_softmax(dim=-1)

    def _adapt(self, adapters: tuple[tuple[str, float], ...]) -> Any:
        """A PEFT model with these adapters active, each one's scale times its weight (no saved heads among several)."""
        if adapters not in self._adapted:
            self._adapted[adapters] = self._build(adapters)
        return self._adapted[adapters]

    def _build(self, adapters: tuple[tuple[str, float], ...]) -> Any:
        if not adapters:
            return self._model
        if len(adapters) == 1 and adapters[0][1] == 1:
            return PeftModel.from_pretrained(_copy(self._model), self._folders[adapters[0][0]]).eval()
        (first, _), *others = adapters
        model = PeftModel.from_pretrained(_copy(self._model), self._folders[first], adapter_name=first)
        for name, _ in others:
            model.load_adapter(self._folders[name], adapter_name=name)
        model.base_model.set_adapter([name for name, _ in adapters])
        for module in model.modules():
            if isinstance(module, LoraLayer):
                for name, weight in adapters:
                    if name in module.scaling:
                        module.scaling[name] *= weight
        return model.eval()


def _copy(model: Any) -> Any:
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.eval().requires_grad_(False)
