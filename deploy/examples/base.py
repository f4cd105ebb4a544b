"""The base model the example adapters belong to, and greedy answers from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from server.model.loader import load_base_model

BASE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def load_base() -> tuple[Any, Any]:
    """The default base model in fp32 on the CPU, as the server loads it, and its tokenizer."""
    transformers_logging.disable_progress_bar()
    base = load_base_model("smollm2", dtype=torch.float32)
    return base.model, base.tokenizer


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and positions, each int64 [rows, longest], with `pad` on the left."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


@torch.inference_mode()
def greedy(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, batch: int = 64) -> list[str]:
    """The most likely continuation of each prompt, up to a newline or `max_new_tokens`."""
    model.eval()
    # Byte-level BPE writes the newline byte as this letter; `stop_strings` would search every token text at each step.
    newlines = [index for text, index in tokenizer.get_vocab().items() if "\u010a" in text]
    texts: list[str] = []
    for start in range(0, len(prompts), batch):
        rows = [tokenizer(prompt).input_ids for prompt in prompts[start : start + batch]]
        ids, mask, _ = left_padded(rows, tokenizer.eos_token_id)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.eos_token_id,
            eos_token_id=[tokenizer.eos_token_id, *newlines],
        )
        texts += tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return texts
