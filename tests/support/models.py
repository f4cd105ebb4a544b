"""Tiny seeded models of many architectures, and a small real tokenizer: no download, a few milliseconds each."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 320
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": PAD_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}
_GROUPED: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2, "head_dim": 16}
_NO_HEAD_DIM: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2}
_MIXED_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
_MOE: dict[str, Any] = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

TINY_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {**_GROUPED, "tie_word_embeddings": True},
    "qwen2": _NO_HEAD_DIM,
    "qwen3": {**_GROUPED, "head_dim": 32},
    "mistral": {**_GROUPED, "sliding_window": 12},
    "gemma": {**_GROUPED, "tie_word_embeddings": True},
    "gemma2": {
        **_GROUPED,
        "layer_types": _MIXED_LAYERS,
        "sliding_window": 12,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        **_GROUPED,
        "layer_types": _MIXED_LAYERS,
        "sliding_window": 12,
        "query_pre_attn_scalar": 16,
        "tie_word_embeddings": True,
    },
    "phi3": _NO_HEAD_DIM,
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 256,
        "eos_token_id": EOS_ID,
    },
    "gpt_neox": {**_COMMON, "tie_word_embeddings": False},
    # Not asked for by name, but they prove that no per-model code is needed.
    "opt": {**_COMMON, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi": {**_COMMON, "num_key_value_heads": 2},
    "granite": {**_NO_HEAD_DIM, "attention_multiplier": 0.2, "logits_scaling": 2.0, "embedding_multiplier": 3.0},
    "olmo2": _NO_HEAD_DIM,
    "starcoder2": {**_NO_HEAD_DIM, "sliding_window": 12},
    "qwen3_moe": {**_GROUPED, **_MOE},
}


def tiny_model(architecture: str, seed: int = 0, **overrides: Any) -> Any:
    """A float32 causal LM of `TINY_ARCHITECTURES` (or any transformers model type, given its config) on the CPU.

    Its weights are larger than at a usual start, so that logits differ clearly between tokens and positions.
    """
    options = {**TINY_ARCHITECTURES.get(architecture, {}), **overrides}
    config = AutoConfig.for_model(architecture, **options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(0.0, 0.2)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval().requires_grad_(False)


def tiny_tokenizer() -> Any:
    """Byte-level BPE over at most `VOCABULARY` tokens; decode(encode(text)) is text, whatever the script."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus = ["the adapter answers the question of the request", "one base model, many adapters, one batch"]
    tokenizer.train_from_iterator(corpus * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def save_tiny(path: Path, architecture: str = "llama", seed: int = 0, **overrides: Any) -> Path:
    """Write a model folder (safetensors, config, tokenizer with chat template) and return it."""
    tiny_model(architecture, seed, **overrides).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path
