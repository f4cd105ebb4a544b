"""What the methods that fold share: seeds within bounds, forms by size."""

from pathlib import Path
from typing import Any

import pytest
from peft import (
    LoHaConfig,
    PeftConfig,
    PsoftConfig,
    PveraConfig,
    RandLoraConfig,
    TinyLoraConfig,
    UniLoraConfig,
    VeraConfig,
)

from adapters_store.forms import Dense, LowRank
from tests.adapters_store.formats.kinds.support import edit_config, imported, options, refused, trained

SEEDS: dict[str, tuple[type[PeftConfig], dict[str, Any]]] = {
    "projection_prng_key": (VeraConfig, {"r": 2}),
    "projection_seed": (TinyLoraConfig, {"r": 2}),
    "proj_seed": (UniLoraConfig, {"r": 2}),
    "random_seed": (PsoftConfig, {"r": 2}),
}


@pytest.mark.parametrize("value", [-1, 1 << 62, 10**40])
@pytest.mark.parametrize("name", SEEDS)
def test_a_seed_that_no_generator_takes_is_refused(tmp_path: Path, name: str, value: int) -> None:
    kind, further = SEEDS[name]
    base, _ = trained("llama", kind(**options("llama", **further)), tmp_path)
    edit_config(tmp_path, **{name: value})
    refused(tmp_path, base, "bad_config", match=name)


@pytest.mark.parametrize("kind", [PveraConfig, RandLoraConfig])
def test_the_other_methods_of_that_seed_refuse_it_too(tmp_path: Path, kind: type[PeftConfig]) -> None:
    base, _ = trained("llama", kind(**options("llama", r=2)), tmp_path)
    edit_config(tmp_path, projection_prng_key=-1)
    refused(tmp_path, base, "bad_config", match="projection_prng_key")


def test_the_smaller_form_is_taken(tmp_path: Path) -> None:
    """Rank 25 of 64 x 64 is below 64 * 64 / 128, of 32 x 64 above 32 * 64 / 96."""
    base, _ = trained("llama", LoHaConfig(**options("llama", r=5)), tmp_path)
    found = imported(tmp_path, base)[1].modules
    by_name = {name.rpartition(".")[2]: forms[0] for name, forms in found.items()}
    assert isinstance(by_name["q_proj"], LowRank)
    assert isinstance(by_name["v_proj"], Dense)
