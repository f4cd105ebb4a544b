"""Every form on every kind of module, mixed in a batch, against a model whose modules compute it densely."""

import pytest
import torch

from adapters_store.forms import AdapterWeights
from server.engine.adapter_pool import Placement
from server.engine.adapter_storage import AdapterStorage
from server.engine.packing import pack
from server.model.base import BaseModel
from server.model.step_context import AdapterTable, StepContext
from tests.model.paged import difference, prepared, random_requests, run
from tests.support import dense_forms
from tests.support.form_models import KINDS, Modules, forms
from tests.support.models import VOCABULARY, tiny_model

LENGTHS = [17, 9, 12, 6]
PAGE = 1 << 14


def place(base: BaseModel, context: StepContext, adapters: list[Modules]) -> None:
    """Adapter i lies in slot i, as the engine packs and stores it."""
    packed = [pack(AdapterWeights(str(i), m), base.spec.embeddings, PAGE) for i, m in enumerate(adapters)]
    context.pool = torch.full((sum(p.num_bytes for p in packed) + 64,), 0xFF, dtype=torch.uint8)
    context.table = AdapterTable(context.module_names, len(adapters))
    storage, start = AdapterStorage(context.pool, context.table), 64
    for slot, adapter in enumerate(packed):
        offsets = []
        for size in adapter.sizes:
            offsets.append(start)
            start += size
        storage.write(Placement(slot, tuple(offsets), ()), adapter)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text"])
def test_mixed_rows_equal_dense_computation(architecture: str) -> None:
    base, context = prepared(architecture)
    torch.manual_seed(3)
    adapters = [forms(kind, base.spec) for kind in KINDS]
    place(base, context, adapters)
    for first in range(0, len(KINDS), 3):
        slots = [*range(first, min(first + 3, len(KINDS))), None]
        requests = random_requests(LENGTHS[: len(slots)], VOCABULARY, seed=1, slots=slots)
        swapped = random_requests(LENGTHS[: len(slots)], VOCABULARY, seed=1, slots=[*slots[1:-1], slots[0], None])
        found, others = run(base, context, requests, seed=2), run(base, context, swapped, seed=2)
        for request, logits, other in zip(requests, found, others, strict=True):
            modules = {} if request.slot is None else adapters[request.slot]
            weights, ids = AdapterWeights("", modules), torch.tensor([request.tokens])
            expected = dense_forms.logits(tiny_model(architecture), weights, ids)[0]
            kind = None if request.slot is None else KINDS[request.slot]
            assert difference(logits, expected) < 1e-4, kind
            assert torch.equal(logits.argmax(-1), expected.argmax(-1)), kind
            assert request.slot is None or difference(other, expected) > 0.01, kind


def test_norms_are_those_over_the_whole_width() -> None:
    base, _ = prepared("gemma3_text")
    names = set(base.spec.norms)
    assert {"model.norm", "model.layers.0.input_layernorm"} <= names
    assert not [name for name in names if "q_norm" in name or "k_norm" in name], "those see heads as rows"
    assert set(base.spec.norms.values()) == {64}
