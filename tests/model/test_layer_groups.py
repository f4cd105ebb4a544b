"""Which calls of a traced graph become one, and that the graph computes what it did."""

from collections import Counter

import pytest
import torch
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from kernels import dispatch
from kernels.segments import Segments
from server.model.layer_groups import group_products
from tests.kernels.support import Group, lowrank_adapter, pack, segments_of

INNER, OUTER, ROWS = 20, 30, 5
SEGMENTS = segments_of(Group(0, [0, 1]), Group(1, [3]))
Weight = tuple[torch.Tensor, torch.Tensor]


def weights(count: int) -> list[torch.Tensor]:
    flat = []
    for _ in range(count):
        flat += [
            dispatch.int8_pack(torch.randint(-127, 128, (OUTER, INNER), dtype=torch.int8)),
            torch.rand(OUTER) / 127,
        ]
    return flat


def product(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """As `Int8Linear.forward`: rows flattened, the result with all axes."""
    return dispatch.int8_linear(x.reshape(-1, INNER), packed, scale).view(1, -1, OUTER)


def _segments(slot: torch.Tensor, start: torch.Tensor, token: torch.Tensor, weight: torch.Tensor) -> Segments:
    return Segments(slot, start, token, weight)


def adapted(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    pool: torch.Tensor,
    records: torch.Tensor,
    *step: torch.Tensor,
) -> torch.Tensor:
    """As `AdapterLinear.forward`."""
    y = product(x, packed, scale)
    dispatch.lowrank(y.view(-1, OUTER), x.reshape(-1, INNER), pool, records, _segments(*step))
    return y


def grouped(function: object, *arguments: torch.Tensor) -> tuple[GraphModule, Counter[str]]:
    """The traced function after grouping, and how often it calls each of our kernels."""
    traced = make_fx(function, tracing_mode="fake")(*arguments)  # type: ignore[arg-type]
    group_products(traced)
    names = [
        node.target._schema.name.removeprefix("polyrank::")
        for node in traced.graph.nodes
        if hasattr(node.target, "_schema") and node.target._schema.name.startswith("polyrank::")
    ]
    return traced, Counter(names)


def step_of(rank: int = 4) -> tuple[torch.Tensor, ...]:
    pool, records = pack([lowrank_adapter(rank, INNER, OUTER, torch.bfloat16) for _ in range(2)])
    return (pool, records, SEGMENTS.slot, SEGMENTS.start, SEGMENTS.token, SEGMENTS.weight)


class TestGrouping:
    @pytest.fixture(autouse=True)
    def native(self) -> None:
        if dispatch.load() != "cpu":
            pytest.skip("no C++ kernels")

    def test_products_of_the_same_rows_at_most_three_a_call(self) -> None:
        def five(x: torch.Tensor, *flat: torch.Tensor) -> torch.Tensor:
            return torch.cat([product(x, *flat[i : i + 2]) for i in range(0, 10, 2)])

        arguments = (torch.randn(1, ROWS, INNER), *weights(5))
        traced, calls = grouped(five, *arguments)
        assert calls == {"int8_linears": 2}
        assert torch.equal(traced(*arguments), five(*arguments))

    def test_a_product_alone_stays_as_it_is(self) -> None:
        def chain(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return product(product(x, packed, scale)[..., :INNER], packed, scale)

        arguments = (torch.randn(1, ROWS, INNER), *weights(1))
        traced, calls = grouped(chain, *arguments)
        assert calls == {"int8_linear": 2}
        assert torch.equal(traced(*arguments), chain(*arguments))

    def test_adapters_join_the_product_they_belong_to(self) -> None:
        def three(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            flat, step = rest[:6], rest[6:]
            return torch.cat([adapted(x, *flat[i : i + 2], *step) for i in range(0, 6, 2)])

        arguments = (torch.randn(1, ROWS, INNER), *weights(3), *step_of())
        traced, calls = grouped(three, *arguments)
        assert calls == {"int8_linears": 1}
        assert torch.equal(traced(*arguments), three(*arguments))
        base = torch.cat([product(arguments[0], *arguments[1:7][i : i + 2]) for i in range(0, 6, 2)])
        assert not torch.equal(traced(*arguments), base)

    def test_what_is_read_before_its_adapters_stays_apart(self) -> None:
        def peeping(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, *step: torch.Tensor) -> torch.Tensor:
            y = product(x, packed, scale)
            before = y * 2
            pool, records, *segments = step
            dispatch.lowrank(y.view(-1, OUTER), x.reshape(-1, INNER), pool, records, _segments(*segments))
            return y + before

        arguments = (torch.randn(1, ROWS, INNER), *weights(1), *step_of())
        traced, calls = grouped(peeping, *arguments)
        assert calls == {"int8_linear": 1, "lowrank_": 1}
        assert torch.equal(traced(*arguments), peeping(*arguments))

    def test_adapters_of_other_rows_stay_apart(self) -> None:
        def crossed(
            x: torch.Tensor, other: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, *step: torch.Tensor
        ) -> torch.Tensor:
            y = product(x, packed, scale)
            pool, records, *segments = step
            dispatch.lowrank(y.view(-1, OUTER), other.reshape(-1, INNER), pool, records, _segments(*segments))
            return y

        arguments = (torch.randn(1, ROWS, INNER), torch.randn(1, ROWS, INNER), *weights(1), *step_of())
        traced, calls = grouped(crossed, *arguments)
        assert calls == {"int8_linear": 1, "lowrank_": 1}
        assert torch.equal(traced(*arguments), crossed(*arguments))

    def test_twice_adapted_stays_apart(self) -> None:
        def twice(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, *step: torch.Tensor) -> torch.Tensor:
            y = adapted(x, packed, scale, *step)
            pool, records, *segments = step
            dispatch.lowrank(y.view(-1, OUTER), x.reshape(-1, INNER), pool, records, _segments(*segments))
            return y

        arguments = (torch.randn(1, ROWS, INNER), *weights(1), *step_of())
        traced, calls = grouped(twice, *arguments)
        assert calls == {"int8_linear": 1, "lowrank_": 2}
        assert torch.equal(traced(*arguments), twice(*arguments))
