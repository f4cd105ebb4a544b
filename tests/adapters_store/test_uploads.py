"""The corpus of bad uploads: each with its status and code, and nothing left in the store.

Rows of the threat table: 4 (formats), 7 (names), 14 to 18 (contents), 19 and 20 (warnings), 21 to 25 (fit and config).
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from adapters_store.errors import CodedError
from adapters_store.forms import BaseSpec
from adapters_store.limits import HeaderLimits, Limits
from adapters_store.local import LocalObjects
from adapters_store.log import Log
from adapters_store.registry import AdapterRegistry
from tests.adapters_store.formats.test_peft_config import BAD as BAD_CONFIGS
from tests.adapters_store.formats.test_peft_config import BESIDE, SERVED, UNSUPPORTED
from tests.adapters_store.support import (
    BASE,
    MODULES,
    NARROW,
    PREFIX,
    VOCABULARY,
    WIDTH,
    Tensors,
    config,
    factors,
    store_files,
    write,
)
from tests.adapters_store.test_magic import WRONG_FILES
from tests.adapters_store.test_names import BAD_NAMES
from tests.adapters_store.test_safetensors_header import BAD as BAD_HEADERS

LIMITS = Limits(max_rank=8, header=HeaderLimits(header_bytes=4096, tensors=20))
Q = f"{PREFIX}model.layers.0.self_attn.q_proj"
SHORT_Q = Q.removeprefix(PREFIX)
LAYER_7 = Q.replace(".0.", ".7.")
V = f"{PREFIX}model.layers.1.self_attn.v_proj"


def changed(**replacements: torch.Tensor | None) -> Tensors:
    """The sound adapter with tensors of layer 0's q_proj replaced (`A`, `B`, `bias`), or taken away."""
    tensors = biased(factors(1)) if "bias" in replacements else factors(1)
    names = {"A": "lora_A.weight", "B": "lora_B.weight", "bias": "lora_B.bias"}
    for part, value in replacements.items():
        key = f"{Q}.{names[part]}"
        tensors.pop(key, None)
        if value is not None:
            tensors[key] = value
    return tensors


def biased(tensors: Tensors) -> Tensors:
    return tensors | {
        name.replace("weight", "bias"): torch.randn(value.shape[0])
        for name, value in tensors.items()
        if "lora_B" in name
    }


def zero_b(tensors: Tensors) -> Tensors:
    return {name: torch.zeros_like(value) if "lora_B" in name else value for name, value in tensors.items()}


def renamed(change: Callable[[str], str]) -> Tensors:
    return {change(name): value for name, value in factors(1).items()}


def plus(**tensors: torch.Tensor) -> Tensors:
    return factors(1) | {name.replace("__", "."): value for name, value in tensors.items()}


def holding(value: float, dtype: torch.dtype = torch.float32) -> Tensors:
    a = torch.randn(2, WIDTH)
    a[1, 3] = value
    return changed(A=a.to(dtype), B=torch.randn(WIDTH, 2).to(dtype))


Case = tuple[int, str, Tensors | bytes, dict[str, Any] | bytes | None]
FIT: dict[str, Case] = {
    # row 15: a matrix where a matrix is due
    "A of one dimension": (422, "bad_tensor_entry", changed(A=torch.randn(16)), None),
    "B of one dimension": (422, "bad_tensor_entry", changed(B=torch.randn(16)), None),
    # row 18
    **{
        f"{value} in {dtype}": (422, "nonfinite_weights", holding(value, dtype), None)
        for value in (math.nan, math.inf, -math.inf)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    },
    "nan in a bias": (
        422,
        "nonfinite_weights",
        changed(bias=torch.full((WIDTH,), math.nan)),
        config(lora_bias=True),
    ),
    "nan in a saved head": (
        422,
        "nonfinite_weights",
        plus(base_model__model__lm_head__weight=torch.full((VOCABULARY, WIDTH), math.nan)),
        config(modules_to_save=["lm_head"]),
    ),
    # row 21
    "rank over the limit": (422, "rank_limit", factors(1, rank=9), config(r=9)),
    "rank 1e9 in the config": (422, "shape_mismatch", factors(1), config(r=10**9)),
    "rank 1e18 in a pattern": (422, "shape_mismatch", factors(1), config(rank_pattern={"q_proj": 10**18})),
    "rank 0": (422, "rank_limit", factors(1), config(r=0)),
    "rank -1": (422, "rank_limit", factors(1), config(r=-1)),
    "rank of the file": (422, "shape_mismatch", factors(1, rank=3), config(r=2)),
    "rank of one module": (422, "shape_mismatch", factors(1), config(rank_pattern={"v_proj": 3})),
    "ranks of A and B": (422, "shape_mismatch", changed(B=torch.randn(WIDTH, 3)), None),
    "transposed B": (422, "shape_mismatch", changed(B=torch.randn(2, WIDTH)), None),
    "A alone": (422, "shape_mismatch", changed(B=None), None),
    "B alone": (422, "shape_mismatch", changed(A=None), None),
    "bias alone": (422, "shape_mismatch", changed(A=None, B=None, bias=torch.randn(WIDTH)), config(lora_bias=True)),
    "no bias": (422, "shape_mismatch", factors(1), config(lora_bias=True)),
    # row 22
    "wider base": (422, "base_mismatch", changed(A=torch.randn(2, 2 * WIDTH)), None),
    "wider outputs": (422, "base_mismatch", changed(B=torch.randn(WIDTH + 1, 2)), None),
    "bias too long": (422, "base_mismatch", changed(bias=torch.randn(WIDTH + 1)), config(lora_bias=True)),
    "more layers": (422, "base_mismatch", plus(**{f"{LAYER_7}.lora_A.weight": torch.randn(2, 8)}), None),
    "other vocabulary": (
        422,
        "base_mismatch",
        {
            f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.randn(2, VOCABULARY + 8),
            f"{PREFIX}model.embed_tokens.lora_embedding_B": torch.randn(WIDTH, 2),
        },
        config(target_modules=["embed_tokens"]),
    ),
    "larger saved head": (
        422,
        "base_mismatch",
        plus(base_model__model__lm_head__weight=torch.randn(VOCABULARY + 8, WIDTH)),
        config(modules_to_save=["lm_head"]),
    ),
    # row 23
    "another architecture": (422, "no_modules_matched", renamed(lambda name: name.replace("model.layers", "h")), None),
    "no tensors": (422, "no_modules_matched", {}, None),
    "targets nothing": (422, "no_modules_matched", factors(1), config(target_modules=["c_attn"])),
    "targets nothing by regex": (422, "no_modules_matched", factors(1), config(target_modules=r".*\.c_attn")),
    "all targets excluded": (422, "no_modules_matched", factors(1), config(exclude_modules=["q_proj", "v_proj"])),
    # every tensor is used
    "a module that is not selected": (422, "bad_tensor_entry", factors(1), config(target_modules=["q_proj"])),
    "a layer that is not selected": (422, "bad_tensor_entry", factors(1), config(layers_to_transform=[0])),
    "biases that the config denies": (422, "bad_tensor_entry", biased(factors(1)), config(lora_bias=False)),
    "a tensor of no known name": (422, "bad_tensor_entry", plus(extra=torch.randn(3)), None),
    "a scale beside the factors": (422, "bad_tensor_entry", plus(**{f"{Q}.alpha": torch.randn(1)}), None),
    "a bias of the base": (422, "bad_tensor_entry", plus(**{f"{Q}.bias": torch.randn(WIDTH)}), None),
    "linear factors on the embedding": (
        422,
        "shape_mismatch",
        {
            f"{PREFIX}model.embed_tokens.lora_A.weight": torch.randn(2, VOCABULARY),
            f"{PREFIX}model.embed_tokens.lora_B.weight": torch.randn(WIDTH, 2),
        },
        config(target_modules=["embed_tokens"]),
    ),
    "one factor twice": (422, "bad_tensor_entry", plus(**{f"{SHORT_Q}.lora_A.weight": torch.randn(2, 8)}), None),
    # row 24, in the weights
    "magnitude vector": (422, "feature_unsupported", plus(**{f"{Q}.lora_magnitude_vector": torch.randn(WIDTH)}), None),
    "adalora": (422, "feature_unsupported", plus(**{f"{Q}.lora_E": torch.randn(2, 1)}), None),
    "a layer saved whole": (422, "feature_unsupported", plus(**{f"{V}.weight": torch.randn(NARROW, WIDTH)}), None),
    "head saved, not in the config": (
        422,
        "feature_unsupported",
        plus(base_model__model__lm_head__weight=torch.randn(VOCABULARY, WIDTH)),
        None,
    ),
    "saves the embedding": (422, "feature_unsupported", factors(1), config(modules_to_save=["embed_tokens"])),
    "saves a norm": (422, "feature_unsupported", factors(1), config(modules_to_save=["lm_head", "norm"])),
    "ties the weights": (
        422,
        "feature_unsupported",
        factors(1),
        config(target_modules=["q_proj", "v_proj", "lm_head"], ensure_weight_tying=True),
    ),
    "ties a saved head": (
        422,
        "feature_unsupported",
        factors(1),
        config(modules_to_save=["lm_head"], ensure_weight_tying=True),
    ),
    # row 25, beyond the config alone
    "bias on an embedding": (422, "bad_config", factors(1), config(target_modules=["embed_tokens"], lora_bias=True)),
    "alpha beyond float32": (422, "bad_config", factors(1), config(lora_alpha=1e39)),
    "look-ahead": (422, "bad_config", factors(1), config(target_modules="(?!x).*q_proj")),
    "broken regex": (422, "bad_config", factors(1), config(target_modules="((")),
}  # fmt: skip
CORPUS: dict[str, Case] = {
    **{f"format: {name}": (415, "unsupported_format", data, None) for name, (data, _) in WRONG_FILES.items()},
    **{f"header: {name}": (422, code, data, None) for name, (code, data) in BAD_HEADERS.items()},
    **{f"config: {name}": (422, "bad_config", factors(1), data) for name, data in BAD_CONFIGS.items()},
    **{
        f"feature: {name}": (422, "feature_unsupported", factors(1), config(**c, **(BESIDE if name in SERVED else {})))
        for name, c in UNSUPPORTED.items()
    },
    **FIT,
}


@pytest.fixture
def objects(tmp_path: Path) -> LocalObjects:
    return LocalObjects(tmp_path / "store")


def refused(objects: LocalObjects, case: Case, tmp_path: Path, limits: Limits = LIMITS, base: BaseSpec = BASE) -> str:
    """Uploads, checks the refusal and that the store is as before, and returns the message."""
    status, code, tensors, settings = case
    registry = AdapterRegistry(Log(objects), base, limits)
    registry.add("sound", *write(tmp_path / "sound", factors(9)))
    before = {key: objects.get(key) for key in objects.sizes("")}
    message = ""
    for name in ("fresh", "sound"):
        with pytest.raises(CodedError) as caught:
            registry.add(name, *write(tmp_path / "bad", tensors, settings), replace=True)
        assert (caught.value.status, caught.value.code) == (status, code), caught.value.message
        message = caught.value.message
    assert {key: objects.get(key) for key in objects.sizes("")} == before
    assert [info.name for info in registry.list()[0]] == ["sound"]
    assert message.isprintable()
    assert str(tmp_path) not in message
    assert len(message) < 1000
    return message


def test_the_corpus_is_large() -> None:
    assert len(CORPUS) >= 180


@pytest.mark.parametrize("case", CORPUS.values(), ids=CORPUS)
def test_bad_upload(objects: LocalObjects, case: Case, tmp_path: Path) -> None:
    refused(objects, case, tmp_path)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_name(objects: LocalObjects, name: str, tmp_path: Path) -> None:
    with pytest.raises(CodedError) as caught:
        AdapterRegistry(Log(objects), BASE).add(name, *write(tmp_path / "a", factors(1)))
    assert (caught.value.status, caught.value.code) == (422, "bad_name")
    assert store_files(tmp_path / "store") == []


def test_an_overflow_in_the_serving_type(objects: LocalObjects, tmp_path: Path) -> None:
    case: Case = (422, "nonfinite_weights", holding(70_000.0), None)
    assert "float16" in refused(objects, case, tmp_path, Limits(cast=torch.float16))
    registry = AdapterRegistry(Log(objects), BASE, Limits(cast=torch.bfloat16))
    assert registry.add("fits", *write(tmp_path / "bad", holding(70_000.0)))[1]


def test_messages_name_the_fault_and_the_way_out(objects: LocalObjects, tmp_path: Path) -> None:
    message = refused(objects, FIT["rank over the limit"], tmp_path)
    cost = 4 * sum(tensor.numel() for tensor in factors(1, rank=9).values())
    assert all(word in message for word in ("rank 9", "limit is 8", "--max-rank 9", f"{cost} bytes"))
    message = refused(objects, FIT["wider base"], tmp_path)
    assert all(word in message for word in ("[2, 16]", "[2, 8]", "layers.0.self_attn.q_proj"))
    message = refused(objects, FIT["another architecture"], tmp_path)
    assert (message.count("`h."), message.count("`model.") + message.count("`lm_head`")) == (3, 3)
    message = refused(objects, FIT["nan in torch.float32"], tmp_path)
    assert "1 of 16" in message
    assert f"{Q}.lora_A.weight" in message


def test_a_whole_head_that_is_the_bases_own_is_no_change(objects: LocalObjects, tmp_path: Path) -> None:
    own = {"lm_head": torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(4))}
    base = BaseSpec("tiny", "f" * 64, MODULES, "lm_head", True, weight=own.__getitem__)
    registry = AdapterRegistry(Log(objects), base, LIMITS)
    info, _ = registry.add("copy", *write(tmp_path / "a", plus(base_model__model__lm_head__weight=own["lm_head"])))
    assert info.forms == ("low_rank",)
    other = plus(base_model__model__lm_head__weight=own["lm_head"] * 1.05)
    with pytest.raises(CodedError) as caught:
        registry.add("changed", *write(tmp_path / "a", other))
    assert caught.value.code == "base_mismatch"


WARNED: dict[str, tuple[list[str], Tensors, dict[str, Any]]] = {
    "nothing to say": ([], factors(1), config()),
    "zero B": (["adapter_is_noop"], zero_b(factors(1)), config()),
    "zero alpha": (["adapter_is_noop"], factors(1), config(lora_alpha=0)),
    "zero B but a bias": ([], biased(zero_b(factors(1))), config(lora_bias=True)),
    "other base name": (["other_base_name"], factors(1), config(base_model_name_or_path="x/y")),
    "no base name": ([], factors(1), config(base_model_name_or_path=None)),
    "extreme": (["extreme_delta"], {name: 30 * value for name, value in factors(1).items()}, config()),
    "large but usual": ([], {name: 3 * value for name, value in factors(1).items()}, config()),
    "unmatched target": (["unmatched_targets"], factors(1), config(target_modules=["q_proj", "v_proj", "k_proj"])),
    "selected without weights": (
        ["modules_without_weights"],
        factors(1),
        config(target_modules=["q_proj", "v_proj", "down_proj"]),
    ),
    "saved head without weights": (["modules_without_weights"], factors(1), config(modules_to_save=["lm_head"])),
    "tying that changes nothing": ([], factors(1), config(ensure_weight_tying=True)),
    "negative alpha": ([], factors(1), config(lora_alpha=-4)),
}


@pytest.mark.parametrize(("codes", "tensors", "settings"), WARNED.values(), ids=WARNED)
def test_accepted_with_warnings(
    objects: LocalObjects, tmp_path: Path, codes: list[str], tensors: Tensors, settings: dict[str, Any]
) -> None:
    info, created = AdapterRegistry(Log(objects), BASE, LIMITS).add("a", *write(tmp_path / "a", tensors, settings))
    assert created
    assert [notice.code for notice in info.warnings] == codes


def test_limits_are_inclusive(objects: LocalObjects, tmp_path: Path) -> None:
    registry = AdapterRegistry(Log(objects), BASE, LIMITS)
    info, _ = registry.add("a", *write(tmp_path / "a", factors(1, rank=8), config(r=8)))
    assert info.rank.max == 8
    padded = json.dumps(config()).encode().ljust(LIMITS.config_bytes)
    assert registry.add("b", *write(tmp_path / "b", save(factors(1)), padded))[1]
