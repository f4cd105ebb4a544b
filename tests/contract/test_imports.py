"""Who may import whom. An arrow that goes the wrong way fails the build; type-checking imports count."""

import ast
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import pytest

from tests.contract.sources import PACKAGES, ROOT, Source, imports, imports_of, modules, sources, within

WEB = ("fastapi", "starlette", "uvicorn")
TENSORS = ("torch", "transformers")
DOOR = ("kernels.dispatch", "kernels.dispatch_forms", "kernels.dispatch_layer")
TORCH_FREE = (
    "server.engine.request",
    "server.engine.status",
    "server.engine.batch",
    "server.engine.scheduler",
    "server.engine.block_pool",
    "server.engine.adapter_pool",
    "server.settings",
    "server.errors",
    "server.metrics",
    "server.replicas.service",
    "server.jobs.service",
    "server.client",
    "server.cli",
)


@dataclass(frozen=True)
class Rule:
    """What the modules of `scope` may not import; `ours`: the only modules of ours that they may."""

    scope: tuple[str, ...]
    never: tuple[str, ...] = ()
    ours: tuple[str, ...] = PACKAGES

    def broken_by(self, target: str) -> bool:
        return within(target, self.never) or (within(target, PACKAGES) and not within(target, self.ours))


RULES = (
    Rule(("kernels",), ours=("kernels",), never=(*WEB, "transformers")),
    Rule(("adapters_store",), ours=("adapters_store", "kernels.reference", "kernels.segments"), never=WEB),
    Rule(("server",), ours=("server", "adapters_store", *DOOR, "kernels.segments", "kernels.reference")),
    Rule(
        ("server.api",),
        ours=(
            "server.api",
            "server.access.key",
            "server.errors",
            "server.metrics",
            "server.jobs.job",
            "server.engine.request",
            "server.engine.status",
            "server.replicas.rate",
            "server.replicas.state",
            "adapters_store",
        ),
        never=TENSORS,
    ),
    Rule(("server.engine", "server.model"), never=(*WEB, "server.api", "server.app", "server.settings", "server.cli")),
    Rule(("server.replicas",), ours=("server.replicas", "server.errors", "adapters_store"), never=(*WEB, *TENSORS)),
    Rule(TORCH_FREE, never=TENSORS),
    Rule(("server.commands", "server.cli", "server.client"), never=("server.api", "server.engine", *WEB)),
)


def broken(scope: str, targets: Iterable[str]) -> set[str]:
    """The imported modules that the importing one may not import."""
    return {target for rule in RULES if within(scope, rule.scope) for target in targets if rule.broken_by(target)}


@pytest.mark.parametrize("source", sources(), ids=lambda source: str(source.path))
def test_arrows(source: Source) -> None:
    assert broken(source.module, imports_of(source)) == set()


def test_only_tests_import_tests_and_only_serve_imports_the_composition_root() -> None:
    for source in sources():
        targets = imports_of(source)
        if not within(source.module, ("tests",)):
            assert not [target for target in targets if within(target, ("tests",))], source.path
            if source.module != "server.commands.serve":
                assert "server.app" not in targets, source.path


def test_no_import_goes_in_a_ring() -> None:
    graph = {source.module: imports_of(source, in_functions=False) & modules() for source in sources()}
    free: set[str] = set()
    while ready := {module for module, targets in graph.items() if targets <= free} - free:
        free |= ready
    stuck = {module: sorted(targets - free) for module, targets in graph.items() if module not in free}
    assert not stuck


@pytest.mark.parametrize("module", [*TORCH_FREE, "kernels"])
def test_torch_free_modules_bring_no_torch_along(module: str) -> None:
    assert module in modules()
    code = f"import sys, {module}; bad = {{'torch', 'transformers', 'triton'}} & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def seen(code: str, module: str = "server.engine.core", is_package: bool = False) -> set[str]:
    return set(imports(ast.parse(code), module, is_package))


def test_the_reader_sees_every_kind_of_import() -> None:
    assert seen("import torch.nn as nn, os") == {"torch.nn", "os"}
    assert seen("from server.engine import request") == {"server.engine.request"}
    assert seen("from server.engine.request import FinishReason") == {"server.engine.request"}
    assert seen("class A:\n    async def f(self):\n        import torch") == {"torch"}
    assert seen("if TYPE_CHECKING:\n    from fastapi import FastAPI") == {"fastapi"}
    assert seen("from . import request") == {"server.engine.request"}
    assert seen("from .request import FinishReason") == {"server.engine.request"}
    assert seen("from ..errors import Overloaded") == {"server.errors"}
    assert seen("from . import request", "server.engine", is_package=True) == {"server.engine.request"}


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("kernels.dispatch", "import adapters_store.forms"),
        ("kernels.cpu", "from server import errors"),
        ("adapters_store.registry", "from server.errors import InvalidRequest"),
        ("adapters_store.registry", "from kernels import dispatch"),
        ("server.api.routes.tgi", "import torch"),
        ("server.api.routes.tgi", "from server.engine.scheduler import Scheduler"),
        ("server.api.routes.tgi", "from server.model import loader"),
        ("server.api.routes.tgi", "from kernels import segments"),
        ("server.engine.core", "from fastapi import FastAPI"),
        ("server.engine.scheduler", "if TYPE_CHECKING:\n    import torch"),
        ("server.model.loader", "from starlette.requests import Request"),
        ("server.engine.model_runner", "from kernels.cpu import build"),
        ("server.app", "from tests.support import models"),
    ],
)
def test_wrong_arrows_are_found(module: str, code: str) -> None:
    assert broken(module, seen(code, module))


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("server.api.routes.tgi", "from server.engine.request import SamplingParams"),
        ("adapters_store.forms", "from kernels.segments import Field"),
        ("server.app", "from kernels import dispatch"),
        ("tests.e2e.world", "from server.engine.scheduler import Scheduler"),
        ("server.engine.model_runner", "import torch"),
    ],
)
def test_right_arrows_pass(module: str, code: str) -> None:
    assert not broken(module, seen(code, module))
