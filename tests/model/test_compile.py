"""Where layers cannot be compiled the model serves as it is, and says why once."""

import logging
import threading
import time
from collections.abc import Callable

import pytest
import torch

from kernels import dispatch
from server.engine.background_compiler import BackgroundCompiler
from server.model import compile as compiling
from server.model.base import BaseModel
from server.model.compile_probe import Probe, check_compiled
from server.model.decoder_layers import decoder_layers
from server.model.errors import CompileError
from server.model.loader import describe
from server.model.prepare import prepare_model
from server.model.step_context import StepContext
from tests.model.paged import attach_cache, prepared, random_requests, run
from tests.support.models import tiny_model, tiny_tokenizer


def refusal(base: BaseModel, context: StepContext) -> str:
    with pytest.raises(CompileError) as raised:
        compiling.compile_layers(base, context, lambda: None, threads=1)
    return str(raised.value)


def test_plain_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base, context = prepared("llama")
    monkeypatch.setattr(dispatch, "_cpu_loaded", False)
    assert "plain torch" in refusal(base, context)


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    base, context = prepared("llama")
    base.model.model.layers = torch.nn.Sequential(*base.model.model.layers)
    assert "no list of decoder layers" in refusal(base, context)


def test_other_numbers_are_refused() -> None:
    base, _ = prepared("llama")
    before, expected = torch.randn(1, 3, 5), torch.randn(1, 3, 5)
    check_compiled(base, before, expected, expected * (1 + 1e-6))
    for factor in (1.01, float("nan")):
        with pytest.raises(CompileError, match="other numbers"):
            check_compiled(base, before, expected, expected * factor)


def test_the_twin_shares_the_weights_and_leaves_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on the twin (here until the first graph) touches neither the live cache nor the live step."""
    base, context = prepared("gemma2")

    def stop(*_: object, **__: object) -> None:
        raise CompileError("far enough")

    monkeypatch.setattr(compiling, "trace", stop)
    before, step = dict(base.model.state_dict()), context.attention
    assert refusal(base, context) == "far enough"
    assert context.attention is step
    assert context.compiled is None
    assert context.cache is not None
    assert context.cache.buffer.isnan().all()
    assert all(base.model.state_dict()[name] is not None for name in before)
    [logits] = run(base, context, random_requests([6], 300, 1), 1)
    assert logits.isfinite().all()
    twin, own = compiling._twin(base, context)
    assert {p.data_ptr() for p in twin.model.parameters()} == {p.data_ptr() for p in base.model.parameters()}
    assert own is not context
    assert all(getattr(m, "context", own) is own for m in twin.model.modules())


def test_layers_of_two_windows_are_two_kinds() -> None:
    base, context = prepared("gemma2")
    twin, own = compiling._twin(base, context)
    layers = decoder_layers(twin)
    seen = compiling._watch(layers, Probe(twin, own, context))
    first, second, third = (compiling._kind(layer, one) for layer, one in zip(layers, seen, strict=True))
    assert first == third
    assert first != second


class TestBackground:
    """The thread alone; `compile_layers` is exchanged."""

    def compiler(
        self, monkeypatch: pytest.MonkeyPatch, work: Callable[[Callable[[], None]], object]
    ) -> BackgroundCompiler:
        base = describe(tiny_model("llama"), tiny_tokenizer(), "tiny")
        context = prepare_model(base)
        attach_cache(base, context)
        monkeypatch.setattr(compiling, "compile_layers", lambda _, __, progress, ___: work(progress))
        return BackgroundCompiler(base, context)

    def test_a_failure_is_told_in_one_line(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(_: object) -> None:
            raise RuntimeError("\nno compiler\nat all")

        compiler = self.compiler(monkeypatch, fail)
        with caplog.at_level(logging.INFO):
            compiler.start()
            assert not compiler.wait(60)
        [told] = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert told.__dict__["reason"] == "no compiler"

    def test_it_stops_between_stages_and_inside_of_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for between in (False, True):
            begun = threading.Event()

            def work(progress: Callable[[], None], begun: threading.Event = begun, between: bool = between) -> None:
                begun.set()
                while True:
                    time.sleep(0.01)
                    if between:
                        progress()

            compiler = self.compiler(monkeypatch, work)
            compiler.start()
            assert begun.wait(60)
            start = time.monotonic()
            compiler.stop()
            assert time.monotonic() - start < 2
            assert not compiler.wait(10)
            assert not compiler._thread.is_alive()

    def test_stopping_what_never_started_is_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.compiler(monkeypatch, lambda _: None).stop()
