"""Module matching: the same modules, ranks and alphas as PEFT itself finds."""

import json
import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from adapters_store.errors import AdapterInvalid
from adapters_store.formats.peft_config import parse
from adapters_store.formats.peft_match import Matcher, dotted_suffixes
from adapters_store.forms import BaseSpec, ModuleSpec
from tests.adapters_store.support import BASE, config, spec_of
from tests.support.models import tiny_model


def matcher(base: BaseSpec, **changes: Any) -> Matcher:
    return Matcher(parse(json.dumps(config(**changes)).encode(), 1 << 18), base)


CASES: dict[str, dict[str, Any]] = {
    "list": {"target_modules": ["q_proj", "down_proj"]},
    "dotted": {"target_modules": ["self_attn.q_proj", "mlp.down_proj"]},
    "full name": {"target_modules": ["model.layers.1.self_attn.q_proj"]},
    "partial word does not match": {"target_modules": ["q_proj", "proj"]},
    "regex": {"target_modules": r".*\.(q|v)_proj"},
    "regex on layers": {"target_modules": r"model\.layers\.[02]\..*_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "All-Linear": {"target_modules": "All-Linear"},
    "all-linear but some": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "exclude regex": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.1\..*"},
    "exclude full": {"target_modules": ["q_proj"], "exclude_modules": ["model.layers.0.self_attn.q_proj"]},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 1},
    "no layers": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "layers pattern": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "layers patterns": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    "full name beats layers": {
        "target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"],
        "layers_to_transform": [1],
    },
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "head saved": {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    "rank patterns": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"q_proj": 4, r".*\.1\.self_attn.v_proj": 5, "layers.2.mlp.down_proj": 6},
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 3, "v_proj": 7.5},
    },
    "first pattern wins": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"self_attn.q_proj": 3, "q_proj": 4, ".*proj": 5},
    },
    "pattern alternatives": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj|k_proj": 3}},
    "rank pattern of a full name": {
        "target_modules": ["q_proj"],
        "rank_pattern": {"model.layers.1.self_attn.q_proj": 7},
        "layers_to_transform": [0, 1],
    },
}


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_model("llama")


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_selects_what_peft_selects(llama: Any, changes: dict[str, Any]) -> None:
    ours = matcher(spec_of(llama), r=2, lora_alpha=8, **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tied weights, unused patterns: PEFT's remarks are not the point
        theirs = get_peft_model(tiny_model("llama"), LoraConfig(r=2, lora_alpha=8, task_type="CAUSAL_LM", **changes))
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in theirs.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert ours.targeted() == layers.keys()
    assert len(layers) > 0
    for name, layer in layers.items():
        assert (ours.rank(name), ours.alpha(name, 8)) == (
            layer.r["default"],
            layer.lora_alpha["default"],
        ), name


def test_gpt2_names(llama: Any) -> None:
    base = spec_of(tiny_model("gpt2"))
    assert len(matcher(base, target_modules=["c_attn"]).targeted()) == 3
    assert len(matcher(base, target_modules=["c_proj"], layers_to_transform=[1], layers_pattern="h").targeted()) == 2
    everything = matcher(base, target_modules="all-linear").targeted()
    assert everything == {name for name, spec in base.modules.items() if spec.kind == "conv1d"}
    assert spec_of(llama).modules.keys().isdisjoint(everything)


_names = st.sampled_from(
    [
        "model.layers.0.self_attn.q_proj",
        "model.layers.11.mlp.experts.3.down_proj",
        "model.layers.1.mlp.experts.0.down_proj",
        "q_proj",
        "transformer.h.2.attn.c_attn",
        "encoder.layer.4.q",
        "lm_head",
    ]
)
_pieces = st.lists(
    st.sampled_from(["q_proj", "layers", "0", "1", r"\d+", ".", r"\.", ".*", "mlp", "^", "$", "[01]", "model", "x?"]),
    min_size=1,
    max_size=5,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(
    name=_names,
    targets=st.lists(_names | st.sampled_from(["down_proj", "c_attn", "q", "experts.3.down_proj"]), min_size=1),
    layers=st.none() | st.integers(0, 12) | st.lists(st.integers(0, 12), max_size=3),
    pattern=st.none() | st.sampled_from(["layers", "h", "experts", r"(?:layers|layer)", "layers|h"]),
    excluded=st.none() | st.lists(_names, max_size=2),
)
def test_list_matching_agrees_with_peft_everywhere(
    name: str, targets: list[str], layers: Any, pattern: str | None, excluded: list[str] | None
) -> None:
    changes = {"target_modules": targets, "layers_to_transform": layers, "exclude_modules": excluded}
    if pattern is not None and layers is not None:
        changes["layers_pattern"] = pattern
    base = BaseSpec("b", "f", {name: ModuleSpec("linear", 2, 2)})
    theirs = check_target_module_exists(LoraConfig(**changes), name)
    assert matcher(base, **changes).targeted() == ({name} if theirs else set())


@settings(max_examples=300, deadline=None)
@given(name=_names, patterns=st.dictionaries(_pieces, st.integers(1, 9), max_size=4))
def test_patterns_agree_with_peft_everywhere(name: str, patterns: dict[str, int]) -> None:
    try:
        ours = matcher(BASE, rank_pattern=patterns, r=10).rank(name)
    except AdapterInvalid as error:
        assert "RE2" in error.message or "too large" in error.message  # noqa: PT017
        return
    assert ours == patterns.get(get_pattern_key(patterns, name), 10)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r"(?!lm_head).*"},
        {"target_modules": r".*(?<=q_)proj"},
        {"target_modules": r"(.)\1"},
        {"target_modules": "((("},
        {"target_modules": "(a{1000}){1000}"},
        {"target_modules": ["q_proj"], "exclude_modules": "(?=a)"},
        {"target_modules": ["q_proj"], "rank_pattern": {"(?!a)": 1}},
        {"target_modules": ["q_proj"], "rank_pattern": {f"a{n}": 1 for n in range(2001)}},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "(?P<idx>a)"},
    ],
)
def test_what_re2_cannot_run_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        matcher(BASE, **changes)
    assert caught.value.code == "bad_config"


def test_a_hostile_pattern_is_harmless() -> None:
    """Python's own engine would need years for this one."""
    base = BaseSpec("b", "f", {"a" * 60 + "!": ModuleSpec("linear", 2, 2)})
    assert matcher(base, target_modules="(a+)+$").targeted() == set()


def test_unused_targets_and_saved_entries() -> None:
    found = matcher(BASE, target_modules=["q_proj", "k_proj", "gate"], modules_to_save=["lm_head", "norm"])
    assert found.unused_targets() == ["gate", "k_proj"]
    assert found.saved_entries() == ["norm"]


def test_suffixes() -> None:
    assert list(dotted_suffixes("a.b.c")) == ["a.b.c", "b.c", "c"]
    assert list(dotted_suffixes("a")) == ["a"]
