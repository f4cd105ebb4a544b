"""Makes one call of the int8 products in a traced layer that read the same rows, and of the adapters on them."""

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

MOST = 3  # products that one call takes
_VIEWS = frozenset({"aten::view", "aten::reshape", "aten::_unsafe_view"})


def group_products(traced: GraphModule) -> None:
    """Rewrite a graph of `layer_trace.trace` in place: `int8_linear` and `lowrank_` become `int8_linears` where they
    can, which gives the same bits (`kernels/cpu/int8_linears.cpp`). Everything else stays as it was traced."""
    places = {node: place for place, node in enumerate(traced.graph.nodes)}
    groups: dict[Any, list[tuple[Node, Node | None]]] = {}
    for node in places:
        if _calls(node, "polyrank::int8_linear") and not _changes(_source(node.args[0])):
            adapter = _adapter(node, places)
            common = None if adapter is None else (adapter.args[2], *adapter.args[4:])  # all but y, x and records
            groups.setdefault((_source(node.args[0]), common), []).append((node, adapter))
    for alike in groups.values():
        for first in range(0, len(alike), MOST):
            members = alike[first : first + MOST]
            if (len(members) > 1 or members[0][1] is not None) and _all_given(members):
                _replace(traced.graph, members)
    traced.graph.eliminate_dead_code()
    traced.recompile()


def _schema(node: Node) -> Any:
    """Of the operator that a node calls, or None."""
    return getattr(node.target, "_schema", None) if node.op == "call_function" else None


def _calls(node: Node, name: str) -> bool:
    schema = _schema(node)
    return schema is not None and schema.name == name


def _is_view(node: Node) -> bool:
    schema = _schema(node)
    return schema is not None and schema.name in _VIEWS and not schema.overload_name  # not aten::view.dtype


def _source(node: Any) -> Any:
    """The node that a chain of views looks at."""
    while isinstance(node, Node) and _is_view(node):
        node = node.args[0]
    return node


def _adapter(product: Node, places: dict[Node, int]) -> Node | None:
    """The one call that adds adapters of the same rows to a product before anything reads it."""
    readers = list(_readers(product))
    first = min(readers, key=places.__getitem__, default=None)
    if first is None or not _calls(first, "polyrank::lowrank_"):
        return None
    y, x = first.args[:2]
    fits = _source(y) is product and _source(x) is _source(product.args[0])
    alone = sum(_calls(reader, "polyrank::lowrank_") for reader in readers) == 1
    return first if fits and alone else None


def _changes(node: Any) -> bool:
    """Whether some call writes to this tensor or a view of it."""
    if not isinstance(node, Node):
        return False
    writers = (reader for reader in _readers(node) if (schema := _schema(reader)) is not None and schema.is_mutable)
    return any(_source(writer.args[0]) is node for writer in writers)


def _readers(node: Node) -> set[Node]:
    """What uses a tensor, through whatever views."""
    found: set[Node] = set()
    for user in node.users:
        found |= _readers(user) if _is_view(user) else {user}
    return found


def _all_given(members: list[tuple[Node, Node | None]]) -> bool:
    """Whether the call can move to the first product: all but the rows are inputs of the graph."""
    given = [argument for product, _ in members for argument in product.args[1:]]
    given += [argument for _, adapter in members if adapter is not None for argument in adapter.args[2:]]
    return all(argument is None or (isinstance(argument, Node) and argument.op == "placeholder") for argument in given)


def _replace(graph: Graph, members: list[tuple[Node, Node | None]]) -> None:
    """One call before the first product; what each gave are columns of what the call gives."""
    missing = [None] * (MOST - len(members))
    weights = [argument for product, _ in members for argument in product.args[1:]]
    adapters = [adapter for _, adapter in members if adapter is not None]
    common: list[Any] = [None] * (MOST + 5)
    if adapters:
        common = [adapters[0].args[2], *(adapter.args[3] for adapter in adapters), *missing, *adapters[0].args[4:]]
    first = members[0][0]
    with graph.inserting_before(first):
        arguments = (first.args[0], *weights, *missing * 3, *common)
        call = graph.call_function(torch.ops.polyrank.int8_linears.default, arguments)
        column, outputs = 0, []
        for product, _ in members:
            end = column + _outputs(product)
            outputs.append(graph.call_function(torch.ops.aten.slice.Tensor, (call, 1, column, end)))
            column = end
    for adapter in adapters:
        graph.erase_node(adapter)
    for (product, _), output in zip(members, outputs, strict=True):
        product.replace_all_uses_with(output)
        graph.erase_node(product)


def _outputs(product: Node) -> int:
    """Columns of a product: the length of its scale, which no step changes."""
    return int(product.args[2].meta["val"].shape[0])  # type: ignore[union-attr]
