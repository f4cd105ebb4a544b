"""How many adapters of rank 16 on all linears of the default model, 4.9 M parameters each, a gibibyte holds."""

import pytest
import torch

from adapters_store.compression import int4
from adapters_store.forms import AdapterWeights, Delta, Form, Int4LowRank, Int4Rows, LowRank, SharedBasis
from server.engine.adapter_pool import AdapterPool
from server.engine.host_cache import HostCache
from server.engine.packing import PackedAdapter, pack
from server.engine.page_allocator import PageAllocator

GIBIBYTE = 1 << 30
RANK, LAYERS = 16, 30
SHAPES = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]  # inputs, outputs
PARAMETERS = LAYERS * sum(RANK * (inputs + outputs) for inputs, outputs in SHAPES)
PAGES = [16 * LAYERS * 2 * 3 * 64 * element for element in (2, 4)]  # a KV block: tokens, layers, K and V, heads, width
CLUSTERS = 25


def int8(inputs: int, outputs: int, _: int) -> LowRank:
    a, b = torch.zeros(RANK, inputs, dtype=torch.int8), torch.zeros(outputs, RANK, dtype=torch.int8)
    return LowRank(a, b, torch.ones(RANK))


def four_bits(inputs: int, outputs: int, _: int) -> Delta:
    return Int4LowRank(rows(inputs), rows(outputs), torch.ones(RANK))


def joint(inputs: int, outputs: int, cluster: int) -> Delta:
    """JD-Full: a core of one's own between the bases of its cluster."""
    u = torch.full((outputs, RANK), float(cluster), dtype=torch.bfloat16)
    return SharedBasis(u, torch.zeros(RANK, inputs, dtype=torch.bfloat16), torch.zeros(RANK, RANK))


def rows(columns: int) -> Int4Rows:
    found, _ = int4.pack(torch.zeros(RANK, columns))
    return found


def adapter(kind: str, number: int, page_bytes: int) -> PackedAdapter:
    make = {"int8": int8, "int4": four_bits, "joint": joint}[kind]
    modules: dict[str, tuple[Form, ...]] = {
        f"{layer}.{index}": (make(*shape, number % CLUSTERS),)
        for layer in range(LAYERS)
        for index, shape in enumerate(SHAPES)
    }
    return pack(AdapterWeights(str(number), modules), frozenset(), page_bytes)


def test_the_adapter_is_the_one_of_the_title() -> None:
    assert PARAMETERS == 4_884_480
    forms = [int8(*shape, 0) for shape in SHAPES]
    assert sum(form.a.numel() + form.b.numel() for form in forms) * LAYERS == PARAMETERS


@pytest.mark.parametrize("page_bytes", PAGES)
@pytest.mark.parametrize(("kind", "count"), [("int8", 200), ("int4", 400)])
def test_host_memory_holds_them(kind: str, count: int, page_bytes: int) -> None:
    """All are alike, so one stands for the others: the cache counts bytes."""
    one = adapter(kind, 0, page_bytes)
    cache = HostCache(GIBIBYTE)
    for number in range(count):
        cache.put(PackedAdapter(str(number), one.own, one.records))
    assert len(cache) == count
    assert cache.counters.evictions == 0
    assert cache.bytes_used == count * one.num_bytes


@pytest.mark.parametrize(
    ("kind", "page_bytes", "count"),
    # An adapter's last page is its own: of pages of a float32 cache it needs 4, where 3.5 would do.
    [("int8", PAGES[0], 200), ("int8", PAGES[1], 200), ("int4", PAGES[0], 400), ("int4", PAGES[1], 364)],
)
def test_the_device_pool_holds_them(kind: str, page_bytes: int, count: int) -> None:
    one = adapter(kind, 0, page_bytes)
    pool = AdapterPool(PageAllocator(GIBIBYTE // page_bytes, page_bytes), 1024)
    for number in range(count):
        pool.want(str(number))
        pool.take_wanted(1)
        assert pool.place(str(number), one.sizes) is not None
    assert pool.num_resident == count
    assert pool.counters.evictions == 0


@pytest.mark.parametrize("page_bytes", PAGES)
def test_a_thousand_of_shared_bases(page_bytes: int) -> None:
    """25 clusters of 40: each has its bases once, and each adapter its cores."""
    by_cluster = [adapter("joint", number, page_bytes) for number in range(CLUSTERS)]
    cache = HostCache(GIBIBYTE)
    pool = AdapterPool(PageAllocator(GIBIBYTE // page_bytes, page_bytes), 1000)
    for number in range(1000):
        one = by_cluster[number % CLUSTERS]
        digest = str(number)
        cache.put(PackedAdapter(digest, one.own, one.records, one.shared))
        pool.want(digest)
        pool.take_wanted(1)
        assert pool.place(digest, one.sizes, shared=one.shared_sizes) is not None
    assert len(cache) == pool.num_resident == 1000
    assert cache.counters.evictions == pool.counters.evictions == 0
    assert len({key for one in by_cluster for key in one.shared}) == CLUSTERS
    cache.check_integrity()
    pool.check_integrity([])
