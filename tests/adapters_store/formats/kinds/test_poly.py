"""Poly against PEFT, task by task."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PolyConfig

from adapters_store.errors import KnobRefused
from adapters_store.formats import importer, peft
from adapters_store.formats.kinds import poly
from adapters_store.variants import Variant
from tests.adapters_store.formats.kinds.support import (
    IDS,
    LIMITS,
    LINEAR,
    check_damage,
    check_fields,
    edit_config,
    imported,
    options,
    refused,
    trained,
)
from tests.adapters_store.support import spec_of
from tests.support import dense_forms


def config(architecture: str, **further: Any) -> PolyConfig:
    return PolyConfig(**options(architecture, **{"r": 4, "n_tasks": 3, "n_skills": 2, **further}))


def ours(folder: Path, base: Any, variant: Variant) -> torch.Tensor:
    texts = (folder / peft.CONFIG_FILE).read_bytes(), folder / peft.WEIGHTS_FILE
    weights = importer.Loader(spec_of(base), LIMITS).load(*texts, "d" * 64, variant)
    return dense_forms.logits(base, weights, IDS)


@pytest.mark.parametrize("architecture", LINEAR)
@pytest.mark.parametrize("splits", [1, 4])
def test_every_task_equals_peft(tmp_path: Path, architecture: str, splits: int) -> None:
    def change(name: str, parameter: torch.Tensor) -> None:
        parameter.normal_(0.0, 1.5 if "router" in name else 0.3)

    base, adapted = trained(architecture, config(architecture, n_splits=splits), tmp_path, change=change)
    found = imported(tmp_path, base)[0]
    assert (found.kind, found.forms, found.rank) == ("poly", ("low_rank",), {"min": 4, "max": 4})
    assert found.knobs == {"task": {"count": 3}}
    results = []
    for task in range(3):
        with torch.inference_mode():
            expected = adapted(IDS, task_ids=torch.tensor([task])).logits
        results.append(ours(tmp_path, base, Variant(task=task)))
        torch.testing.assert_close(results[-1], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert (results[0] - results[1]).abs().max() > 0.01 * results[0].abs().max()
    assert torch.equal(ours(tmp_path, base, Variant()), results[0])


def test_another_adapter_gives_something_else(tmp_path: Path) -> None:
    base, _ = trained("llama", config("llama"), tmp_path / "a")
    trained("llama", config("llama"), tmp_path / "b", seed=1)
    first, second = (ours(tmp_path / name, base, Variant()) for name in "ab")
    assert (first - second).abs().max() > 0.01 * first.abs().max()


def test_one_task_leaves_nothing_to_choose(tmp_path: Path) -> None:
    base, _ = trained("llama", config("llama", n_tasks=1), tmp_path)
    assert imported(tmp_path, base)[0].knobs == {}


def test_a_task_that_is_not_there_is_refused(tmp_path: Path) -> None:
    base, _ = trained("llama", config("llama"), tmp_path)
    with pytest.raises(KnobRefused):
        ours(tmp_path, base, Variant(task=3))


def test_damage_is_refused(tmp_path: Path) -> None:
    check_damage("llama", config("llama"), tmp_path, "poly_lora_A", "poly_lora_B", "poly_router.module_logits")


@pytest.mark.parametrize(("changes", "code"), [({"n_splits": 5}, "shape_mismatch"), ({"n_tasks": 0}, "bad_config")])
def test_what_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], code: str) -> None:
    base, _ = trained("llama", config("llama"), tmp_path)
    edit_config(tmp_path, **changes)
    refused(tmp_path, base, code)


def test_every_field_is_known() -> None:
    check_fields(poly.PolyConfig, PolyConfig)
