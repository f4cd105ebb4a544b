"""What quantization costs in quality: perplexity on a fixed text, and how often the likeliest next token stays.

python -m tests.bench.quality [--quantize int8] [--model smollm2] [--window 512]
"""

import argparse
from pathlib import Path

import torch

from server.model.base import BaseModel
from server.model.kv_cache import KVCache, cache_dtype
from server.model.loader import load_base_model
from server.model.prepare import forward, prepare_model
from server.model.quantize import CHOICES
from server.model.step_context import AttentionMetadata, StepContext

TEXT = Path(__file__).with_name("text.txt")  # written for this test: no model has been trained on it
PAGE = 16


def window_logits(base: BaseModel, context: StepContext, tokens: list[int], cached: torch.dtype) -> torch.Tensor:
    """Logits of every token of one window, computed as the prefill of one request; float32 [tokens, vocabulary].

    cached: type of the KV cache, through which a prompt's own keys and values pass too.
    """
    count, pages = len(tokens), -(-len(tokens) // PAGE)
    shape = (base.num_layers, base.num_kv_heads, base.head_dim)
    context.cache = KVCache(pages, *shape, dtype=cached, device=base.device, page_size=PAGE)
    context.begin(
        AttentionMetadata(
            query_start=torch.tensor([0, count], dtype=torch.int32),
            kv_length=torch.tensor([count], dtype=torch.int32),
            block_table=torch.arange(pages, dtype=torch.int32)[None],
            slots=torch.arange(count),
        )
    )
    return forward(base, context, torch.tensor(tokens), torch.arange(count), torch.arange(count))


def measure(model: str, quantization: str, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Per predicted token of the text: its log probability, and the token found likeliest in its place."""
    base = load_base_model(model, dtype=torch.float32)
    context = prepare_model(base, quantization)
    ids = base.tokenizer(TEXT.read_text())["input_ids"]
    likelihood, likeliest = [], []
    for first in range(0, len(ids) - 1, window):
        tokens = ids[first : first + window + 1]
        logprobs = window_logits(base, context, tokens[:-1], cache_dtype(base.dtype, quantization)).log_softmax(dim=-1)
        likelihood.append(logprobs.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0])
        likeliest.append(logprobs.argmax(dim=-1))
    return torch.cat(likelihood), torch.cat(likeliest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--quantize", default="int8", choices=CHOICES)
    parser.add_argument("--window", type=int, default=512, help="tokens that see each other")
    options = parser.parse_args()
    exact, first = measure(options.model, "none", options.window)
    rounded, second = measure(options.model, options.quantize, options.window)
    print(f"{options.model}, {len(exact)} tokens in windows of {options.window}, float32")
    print(
        f"perplexity              none {(-exact.mean()).exp():.3f}   {options.quantize} {(-rounded.mean()).exp():.3f}"
    )
    moves = (rounded - exact).abs()
    print(f"likeliest token stays   {(first == second).float().mean():.2%}")
    print(f"log probability moves   {moves.mean():.4f} nats on average, at most {moves.max():.2f}")


if __name__ == "__main__":
    main()
