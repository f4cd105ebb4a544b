"""What a transformers model answers, a whole forward pass for each token."""

from collections.abc import Sequence
from typing import Any

import torch


def greedy(model: Any, prompt: Sequence[int], count: int, **further: Any) -> tuple[list[int], list[float]]:
    """The likeliest tokens after the prompt, one by one, and their log probabilities.

    further: arguments that the model takes besides.
    """
    ids, logs = list(prompt), []
    with torch.inference_mode():
        for _ in range(count):
            scores = model(input_ids=torch.tensor([ids]), use_cache=False, **further).logits[0, -1].log_softmax(-1)
            ids.append(int(scores.argmax()))
            logs.append(float(scores.max()))
    return ids[len(prompt) :], logs
