"""Time every kernel at the shapes of SmolLM2-135M against the reference: `python -m tests.bench.bench_kernels`.

Prints a table and asserts nothing. GB/s counts what must be read or written once: factors, keys and values.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from kernels import dispatch, reference
from kernels.segments import Field, Segments
from tests.bench.facts import cpu
from tests.kernels.support import Group, PoolBuilder, lowrank_adapter, pack, paged, replacement, segments_of

HIDDEN, KEYS, MLP, VOCABULARY, LAYERS = 576, 192, 1536, 49152, 30
SHAPES = [
    (HIDDEN, HIDDEN),
    (HIDDEN, KEYS),
    (HIDDEN, KEYS),
    (HIDDEN, HIDDEN),
    (HIDDEN, MLP),
    (HIDDEN, MLP),
    (MLP, HIDDEN),
]
RANKS = (8, 16, 32, 64, 8, 16, 32, 64)


@dataclass(frozen=True)
class Case:
    name: str
    run: Callable[[], object]
    slow: Callable[[], object]  # the same by the reference
    megabytes: float


def best(call: Callable[[], object], seconds: float) -> float:
    """Milliseconds of the best call: the machine may be shared."""
    call()
    end, fastest = time.perf_counter() + seconds, float("inf")
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest * 1e3


def adapter_step(
    rows: int, ranks: tuple[int, ...], factor: torch.dtype | str = torch.bfloat16, *, shared: str = ""
) -> Case:
    """All adapter products of one step: 7 linears of 30 layers, rows spread evenly over the adapters.

    shared: "full" or "diag": all adapters stand in one basis, with cores of that kind.
    """
    builder = PoolBuilder()
    shapes = SHAPES * LAYERS
    one_layer = {
        (r, shape): lowrank_adapter(r, *shape, factor, core=shared == "full") for r in ranks for shape in SHAPES
    }
    records = torch.tensor([[builder.add(one_layer[r, shape]) for shape in shapes] for r in ranks])
    if shared:
        records[1:, :, [Field.A, Field.B]] = records[:1, :, [Field.A, Field.B]]
    pool = builder.pool()
    segments = segments_of(
        *(Group(i, range(i * rows // len(ranks), (i + 1) * rows // len(ranks))) for i in range(len(ranks)))
    )
    x = {size: torch.randn(rows, size).bfloat16() for size in (HIDDEN, MLP)}
    y = {size: torch.randn(rows, size).bfloat16() for size in (HIDDEN, KEYS, MLP)}
    columns = [records[:, i] for i in range(len(shapes))]

    def step(product: Callable[..., object]) -> None:
        for column, (inner, outer) in zip(columns, shapes, strict=True):
            product(y[outer], x[inner], pool, column, segments)

    name = f"lowrank, {rows} rows, {len(ranks)} adapters, 210 modules, {str(factor).removeprefix('torch.')}"
    name += f", shared, {shared}" if shared else ""
    megabytes = pool.numel() / 1e6 / (len(ranks) if shared else 1)
    return Case(name, lambda: step(dispatch.lowrank), lambda: step(reference.lowrank), megabytes)


def lookup(rows: int) -> Case:
    pool, records = pack([lowrank_adapter(r, 1000, HIDDEN, torch.bfloat16, embedding=True) for r in RANKS])
    ids, y = torch.randint(1000, (rows,)), torch.randn(rows, HIDDEN).bfloat16()
    segments = segments_of(*(Group(i, range(i * rows // 8, (i + 1) * rows // 8)) for i in range(8)))
    megabytes = sum(RANKS) * HIDDEN * 2 / 1e6
    return Case(
        f"lowrank_embedding, {rows} rows",
        lambda: dispatch.lowrank_embedding(y, ids, pool, records, segments),
        lambda: reference.lowrank_embedding(y, ids, pool, records, segments),
        megabytes,
    )


def head(rows: int) -> Case:
    pool, records = pack([replacement(HIDDEN, VOCABULARY, torch.bfloat16)])
    x, y = torch.randn(rows, HIDDEN).bfloat16(), torch.randn(rows, VOCABULARY).bfloat16()
    segments: Segments = segments_of(Group(0, range(rows)))
    return Case(
        f"replace_weight, saved head, {rows} rows",
        lambda: dispatch.replace_weight(y, x, pool, records, segments),
        lambda: reference.replace_weight(y, x, pool, records, segments),
        pool.numel() / 1e6,
    )


def attention(requests: int, context: int, queries: int, dtype: torch.dtype) -> Case:
    world = paged([context] * requests, [queries] * requests, dtype=dtype, pool_dtype=dtype)
    arguments = (*world.arguments(), world.scale)
    megabytes = requests * context * KEYS * 2 * dtype.itemsize / 1e6
    return Case(
        f"paged_attention, {requests} x {queries} queries, context {context}, {str(dtype)[6:]}",
        lambda: dispatch.paged_attention(*arguments),
        lambda: reference.paged_attention(*arguments),
        megabytes,
    )


def store(rows: int) -> Case:
    world = paged([rows], [1], dtype=torch.bfloat16, pool_dtype=torch.bfloat16)
    key, value, slots = torch.randn(rows, 3, 64).bfloat16(), torch.randn(rows, 3, 64).bfloat16(), torch.randperm(rows)
    return Case(
        f"write_kv, {rows} tokens",
        lambda: dispatch.write_kv(key, value, world.key_pool, world.value_pool, slots),
        lambda: reference.write_kv(key, value, world.key_pool, world.value_pool, slots),
        2 * rows * KEYS * 2 / 1e6,
    )


def cases() -> Iterator[Case]:
    for factor in (torch.bfloat16, torch.int8, "int4"):
        for rows in (8, 16, 128):
            yield adapter_step(rows, RANKS, factor)
        yield adapter_step(1, (64,), factor)
    for shared in ("full", "diag"):
        yield adapter_step(8, (16,) * 8, shared=shared)
    yield lookup(8)
    yield head(8)
    yield store(8)
    yield store(512)
    for dtype in (torch.bfloat16, torch.float32):
        yield attention(8, 100, 1, dtype)
        yield attention(8, 1000, 1, dtype)
        yield attention(1, 4000, 1, dtype)
        yield attention(1, 512, 512, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=0.5, help="per measurement")
    parser.add_argument("--no-reference", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    most = torch.get_num_threads()
    print(
        f"{cpu()[0]}; {torch.backends.cpu.get_cpu_capability()}; torch {torch.__version__}; {dispatch.load()} kernels"
    )
    print(f"{'case':69} {'1 thread':>10} {f'{most} threads':>10} {'GB/s':>6} {'reference':>10}  ms, best call")
    for case in cases():
        if options.only not in case.name:
            continue
        times = []
        for threads in (1, most):
            torch.set_num_threads(threads)
            times.append(best(case.run, options.seconds))
        slow = 0.0 if options.no_reference else best(case.slow, options.seconds)
        print(f"{case.name:69} {times[0]:10.3f} {times[1]:10.3f} {case.megabytes / min(times):6.1f} {slow:10.2f}")


if __name__ == "__main__":
    main()
