"""Bounds that an upload must keep, each configurable."""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class HeaderLimits:
    """Bounds of a safetensors header.

    20,000 entries of a 1.1 MB header cost 0.04 s to read; 1.6 million, still within the library's own cap of
    100 MB, cost 5.4 s and 1.3 GB.
    """

    header_bytes: int = 4 << 20
    tensors: int = 20_000


@dataclass(frozen=True, slots=True)
class Limits:
    """What `peft.inspect` and `AdapterRegistry.add` allow.

    max_rank: largest rank of any module (`--max-rank`); config_bytes: size of adapter_config.json;
    cast: the type that factors are converted to when served, or None for the file's own: a value that is
    finite in the file but infinite in this type is refused; form_bytes: what the forms of one adapter may take, as they
    are served, where a method's file is smaller than that.
    """

    max_rank: int = 256
    config_bytes: int = 256 << 10
    header: HeaderLimits = field(default_factory=HeaderLimits)
    cast: torch.dtype | None = None
    form_bytes: int = 2 << 30
