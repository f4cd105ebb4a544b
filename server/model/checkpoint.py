"""Reads model and tokenizer through transformers; never runs code from a checkpoint, never unpickles."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from server.model.errors import ModelLoadError


def load_folder(location: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model and tokenizer of a local folder or a hub id.

    Raises ModelLoadError for a quantised or incomplete checkpoint, else what transformers raises.
    """
    options = {"trust_remote_code": False}
    config = AutoConfig.from_pretrained(location, **options)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelLoadError("The checkpoint is quantised. Name the original model in bf16, fp16 or fp32.")
    tokenizer = AutoTokenizer.from_pretrained(location, **options)
    return _complete(location, dtype, config=config, use_safetensors=True, **options), tokenizer


def load_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model and tokenizer of a GGUF file, unpacked to plain weights; raises as `load_folder` does."""
    folder, name = str(path.parent), path.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = _complete(folder, dtype, gguf_file=name, quantization_config=GgufConfig(dequantize=True))
    # The weights are plain now; with these marks transformers would refuse to save them.
    model.is_quantized = False
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


def _complete(location: str, dtype: torch.dtype, **options: Any) -> Any:
    """The model, unless transformers would have filled absent tensors with random numbers (it only logs that)."""
    model, info = AutoModelForCausalLM.from_pretrained(location, dtype=dtype, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise ModelLoadError(
            f"The checkpoint lacks {len(missing)} tensors, {missing[0]} for one. Fetch it again, or check that it is a "
            "causal language model."
        )
    return model
