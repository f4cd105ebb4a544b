"""Our Python sources and what they import, read without importing them."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("server", "adapters_store", "kernels", "deploy", "tests")


@dataclass(frozen=True)
class Source:
    """One file: its dotted module name, its path below the root, and its syntax tree."""

    module: str
    path: Path
    tree: ast.Module

    @property
    def lines(self) -> int:
        return (ROOT / self.path).read_text().count("\n")


@cache
def sources() -> tuple[Source, ...]:
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            relative = path.relative_to(ROOT)
            parts = relative.with_suffix("").parts
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.append(Source(module, relative, ast.parse(path.read_text(), str(relative))))
    return tuple(found)


@cache
def modules() -> frozenset[str]:
    return frozenset(source.module for source in sources())


def imports(tree: ast.AST, module: str, is_package: bool = False, *, in_functions: bool = True) -> Iterator[str]:
    """Every imported module, wherever the import stands: in a function and under TYPE_CHECKING too.

    `from a import b` gives `a.b` where that is a module of ours, else `a`.
    """
    for node in _nodes(tree, in_functions):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = _absolute(node, module, is_package)
            for alias in node.names:
                full = f"{origin}.{alias.name}"
                yield full if full in modules() else origin


def _nodes(tree: ast.AST, in_functions: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        yield node
        if in_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _nodes(node, in_functions)


def imports_of(source: Source, *, in_functions: bool = True) -> set[str]:
    package = source.path.name == "__init__.py"
    return set(imports(source.tree, source.module, package, in_functions=in_functions))


def _absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    kept = parts[: len(parts) - node.level + is_package]
    return ".".join([*kept, *([node.module] if node.module else [])])


def within(module: str, packages: tuple[str, ...]) -> bool:
    """Whether the module is one of the packages or below one."""
    return any(module == package or module.startswith(f"{package}.") for package in packages)
