"""NOLA against the authors' layer, typed in here again."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from adapters_store.errors import AdapterInvalid
from adapters_store.formats.kinds import nola
from adapters_store.formats.kinds.nola import MAX_BASES
from adapters_store.limits import Limits
from tests.adapters_store.formats.kinds.outside import (
    TARGETS,
    Delta,
    Parts,
    added,
    check,
    check_refusals,
    normal,
    refused,
    write,
)
from tests.adapters_store.formats.kinds.support import edit_config, imported
from tests.support.models import tiny_model

RANK, KA, KB = 4, 9, 7
FIELDS = {"peft_type": "NOLA", "r": RANK, "nola_c": 20.0}


def make(weight: torch.Tensor, bias: object, generator: torch.Generator) -> Parts:
    return {"nola_alpha": normal(generator, KA), "nola_beta": normal(generator, KB)}


def authors(seed: int) -> Delta:
    """`NOLA2` of the released code: both bases whole, drawn by the global generator after one seed."""

    def delta(weight: torch.Tensor, parts: Parts) -> torch.Tensor:
        outputs, inputs = weight.shape
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            a, b = torch.zeros(KA, inputs, RANK), torch.zeros(KB, RANK, outputs)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            nn.init.kaiming_uniform_(b, a=math.sqrt(5))
        whole_a = torch.einsum("b,bdr->dr", parts["nola_alpha"], a)
        whole_b = torch.einsum("b,bdr->dr", parts["nola_beta"], b)
        return 20.0 / RANK * (whole_a @ whole_b).T

    return delta


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("seed", [0, 12345])
def test_equals_the_authors_layer(tmp_path: Path, architecture: str, seed: int) -> None:
    found = check(architecture, {**FIELDS, "seed": seed}, tmp_path, make, added(authors(seed)))
    assert (found.kind, found.forms, found.rank) == ("nola", ("low_rank",), {"min": RANK, "max": RANK})


def test_bases_made_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters_store.formats.kinds.nola._BLOCK", 1000)
    check("llama", FIELDS, tmp_path, make, added(authors(0)))


def test_the_global_generator_is_left_alone(tmp_path: Path) -> None:
    base = tiny_model("llama")
    write(base, "llama", FIELDS, tmp_path, make)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    imported(tmp_path, base)
    assert torch.equal(torch.rand(4), expected)


def test_what_is_refused(tmp_path: Path) -> None:
    base = tiny_model("llama")
    write(base, "llama", FIELDS, tmp_path, make)
    refused(tmp_path, base, "adapter_too_large", limits=Limits(form_bytes=1000))
    edit_config(tmp_path, r=10**9)
    refused(tmp_path, base, "rank_limit")
    edit_config(tmp_path, r=RANK, seed=-1)
    refused(tmp_path, base, "bad_config", "seed")


def test_too_many_bases_are_refused(tmp_path: Path) -> None:
    base = tiny_model("llama")

    def many(weight: torch.Tensor, bias: object, generator: torch.Generator) -> Parts:
        return {"nola_alpha": normal(generator, MAX_BASES + 1), "nola_beta": normal(generator, KB)}

    write(base, "llama", FIELDS, tmp_path, many)
    refused(tmp_path, base, "adapter_too_large", "nola_alpha")


def test_bad_files_are_refused(tmp_path: Path) -> None:
    check_refusals(FIELDS, tmp_path, make)


def test_random_numbers_are_bounded_over_all_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the counts of coefficients differ."""
    monkeypatch.setattr(nola, "MAX_DRAWS", 1000)
    base = tiny_model("llama")
    write(base, "llama", FIELDS, tmp_path, make)
    with pytest.raises(AdapterInvalid, match="random numbers") as caught:
        imported(tmp_path, base)
    assert caught.value.code == "adapter_too_large"
