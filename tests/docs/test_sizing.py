"""The worked example of deploy/README.md, computed by what serves."""

import re

import pytest
import torch

from adapters_store.forms import AdapterWeights, Form, LowRank
from server.engine.limits import BLOCK_SIZE
from server.engine.packing import pack
from server.engine.page_allocator import PageAllocator
from server.model.kv_cache import page_bytes
from tests.contract.sources import ROOT

LAYERS, KV_HEADS, HEAD, HIDDEN, INNER = 30, 3, 64, 576, 1536  # of the default model: test_real_server.py asks it
LINEARS = {
    "q": (HIDDEN, HIDDEN),
    "k": (HIDDEN, KV_HEADS * HEAD),
    "v": (HIDDEN, KV_HEADS * HEAD),
    "o": (HIDDEN, HIDDEN),
    "gate": (HIDDEN, INNER),
    "up": (HIDDEN, INNER),
    "down": (INNER, HIDDEN),
}
RANK, REQUESTS, TOKENS, ADAPTERS = 16, 32, 1000, 200


def block_bytes() -> int:
    return page_bytes(LAYERS, KV_HEADS, HEAD, torch.float32, BLOCK_SIZE)


def said(pattern: str) -> float:
    """The number that stands in the section on sizes where the pattern has its group."""
    text = (ROOT / "deploy" / "README.md").read_text().partition("\n## Sizes\n")[2].partition("\n## ")[0]
    found = re.findall(pattern, text.replace(",", ""))
    assert len(found) == 1, pattern
    return float(found[0])


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def pages() -> int:
    """That one adapter of the example takes."""
    factors: dict[str, tuple[Form, ...]] = {
        f"{layer}.{name}": (LowRank(zeros(RANK, inputs), zeros(outputs, RANK), torch.ones(RANK)),)
        for layer in range(LAYERS)
        for name, (inputs, outputs) in LINEARS.items()
    }
    page = block_bytes()
    packed = pack(AdapterWeights("0" * 64, factors), frozenset(), page)
    assert said(r"are (\d+) bytes of factors") == sum(
        2 * (form.a.numel() + form.b.numel()) for (form,) in factors.values() if isinstance(form, LowRank)
    )
    assert said(r"(\d+) bytes in memory") == packed.num_bytes
    placed = PageAllocator(100, page).fit(packed.sizes)
    assert placed is not None
    return len(placed[1])


def test_the_kv_cache() -> None:
    block = block_bytes()
    assert said(r"= (\d+) bytes a block") == block
    assert said(r"(\d+) bytes a token") == block / BLOCK_SIZE
    assert said(r"take (\d+) blocks each") == -(-TOKENS // BLOCK_SIZE)


def test_the_adapters_and_the_sum(pages: int) -> None:
    block = block_bytes()
    assert said(r"which is (\d+) pages") == pages
    kv, adapters = REQUESTS * -(-TOKENS // BLOCK_SIZE) * block, ADAPTERS * pages * block
    mib = 1 << 20
    assert said(r"--kv-cache-memory (\d+)MiB") == -(-kv // mib)
    assert said(r"--adapter-memory (\d+)MiB") == -(-adapters // mib)
    assert said(r"--device-memory (\d+)MiB") == -(-kv // mib) + -(-adapters // mib)
