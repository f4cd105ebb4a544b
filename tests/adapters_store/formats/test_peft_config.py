"""adapter_config.json: PEFT's own files pass; what could change the result and is not served is refused."""

import contextlib
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from adapters_store.errors import AdapterInvalid
from adapters_store.formats.peft_config import PeftConfig, parse
from adapters_store.formats.tuner_config import read_fields
from tests.adapters_store.support import config

LIMIT = 256 << 10


def parsed(**changes: Any) -> PeftConfig:
    return parse(json.dumps(config(**changes)).encode(), LIMIT)


def refusal(data: bytes) -> tuple[str, str]:
    with pytest.raises(AdapterInvalid) as caught:
        parse(data, LIMIT)
    assert caught.value.status == 422
    assert caught.value.message.isprintable()
    return caught.value.code, caught.value.message


def test_every_field_of_peft_is_known() -> None:
    """A new PEFT release must not add a field behind our back."""
    theirs = {field.name for field in dataclasses.fields(LoraConfig)}
    assert theirs - set(PeftConfig.model_fields) == set()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "rank_pattern": {"^a.b": 4}, "alpha_pattern": {"b": 2.5}, "use_rslora": True},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
        {"target_modules": r".*\.q_proj", "exclude_modules": ["lm_head"], "lora_bias": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "lora_dropout": 0.1, "fan_in_fan_out": True},
        {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
        {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
        {"target_modules": ["q_proj"], "init_lora_weights": "eva"},
        {"target_modules": ["q_proj"], "init_lora_weights": False},
    ],
)
def test_what_peft_saves_is_read_back(tmp_path: Path, options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # eva without eva_config
        theirs = LoraConfig(task_type="CAUSAL_LM", r=3, **{"target_modules": ["v_proj"], **options})
    theirs.save_pretrained(tmp_path)
    ours = parse((tmp_path / "adapter_config.json").read_bytes(), LIMIT)
    assert ours.r == 3
    for name in ("lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "layers_to_transform", "lora_bias"):
        assert getattr(ours, name) == getattr(theirs, name)


@pytest.mark.parametrize("value", [None, False, {}, []])
def test_a_newer_field_that_is_off_passes(value: object) -> None:
    assert parsed(some_new_feature=value).r == 2


@pytest.mark.parametrize("value", [True, 1, 0, "x", [1], {"a": None}, ""])
def test_a_newer_field_that_may_matter_is_refused(value: object) -> None:
    code, message = refusal(json.dumps(config(some_new_feature=value)).encode())
    assert code == "bad_config"
    assert "some_new_feature" in message


UNSUPPORTED: dict[str, dict[str, Any]] = {
    "dora and biases": {"use_dora": True, "bias": "all"},
    "qalora": {"use_qalora": True},
    "alora and dora": {"alora_invocation_tokens": [1, 2], "use_dora": True},
    "arrow": {"arrow_config": {"top_k": 3}},
    "kasa": {"kasa_config": {"beta": 1}},
    "velora": {"velora_config": {"num_groups": 64}},
    "monteclora": {"monteclora_config": {"num_samples": 8}},
    "bdlora": {"use_bdlora": {"nblocks": 2}},
    "bdlora flag": {"use_bdlora": True},
    "replication": {"layer_replication": [[0, 2], [1, 3]]},
    "megatron": {"megatron_config": {"a": 1}},
    "parameters": {"target_parameters": ["mlp.experts.down_proj"]},
    "tokens and dora": {"trainable_token_indices": [1], "use_dora": True},
    "tokens map and dora": {"trainable_token_indices": {"embed_tokens": [1]}, "use_dora": True},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "auto_mapping": {"auto_mapping": {"base_model_class": "A", "parent_library": "os"}},
    "auto_mapping more": {"auto_mapping": {"parent_library": "transformers.models.llama", "custom": "x"}},
    "task": {"task_type": "SEQ_CLS"},
    "type": {"peft_type": "XLORA"},
    "type lily": {"peft_type": "LILY"},
    "type object": {"peft_type": {"a": 1}},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa iterations": {"init_lora_weights": "pissa_niter_16"},
    "olora": {"init_lora_weights": "olora"},
    "OLoRA": {"init_lora_weights": "OLoRA"},
    "corda": {"init_lora_weights": "corda"},
    "loftq": {"init_lora_weights": "loftq"},
    "lora_ga": {"init_lora_weights": "lora_ga"},
    "unknown init": {"init_lora_weights": "brand_new"},
}
# cases of UNSUPPORTED that methods of their own serve (`adapters_store.formats.kinds`), and what they refuse beside it
SERVED = frozenset({"qalora", "kasa", "velora", "monteclora", "bdlora", "bdlora flag", "pissa", "olora", "OLoRA"})
BESIDE: dict[str, Any] = {"layer_replication": [[0, 2], [1, 3]]}


@pytest.mark.parametrize("changes", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_features_that_are_not_served(changes: dict[str, Any]) -> None:
    code, message = refusal(json.dumps(config(**changes)).encode())
    assert code == "feature_unsupported"
    assert next(iter(changes)).split("_")[0] in message


def test_all_unserved_features_are_listed_at_once() -> None:
    _, message = refusal(json.dumps(config(use_dora=True, bias="all", layer_replication=[[0, 1]])).encode())
    assert all(name in message for name in ("use_dora", "bias", "layer_replication"))


def test_a_router_over_other_adapters_is_refused_with_the_reason() -> None:
    _, message = refusal(json.dumps(config(arrow_config={"top_k": 3})).encode())
    assert "mixes other adapters" in message


def test_a_residual_start_names_the_way_out() -> None:
    _, message = refusal(json.dumps(config(init_lora_weights="pissa")).encode())
    assert "path_initial_model_for_weight_conversion" in message


_MISTYPED: dict[str, dict[str, Any]] = {
    "r a string": {"r": "8"},
    "r a float": {"r": 8.0},
    "r a boolean": {"r": True},
    "r null": {"r": None},
    "alpha a string": {"lora_alpha": "16"},
    "targets a number": {"target_modules": 3},
    "targets null": {"target_modules": None},
    "targets empty": {"target_modules": []},
    "targets empty text": {"target_modules": ""},
    "targets of numbers": {"target_modules": [1]},
    "targets of lists": {"target_modules": [["q_proj"]]},
    "control character": {"target_modules": ["a\nb"]},
    "lone surrogate": {"target_modules": ["\ud800"]},
    "long pattern": {"target_modules": "a" * 5000},
    "rank pattern list": {"rank_pattern": ["a"]},
    "rank pattern text": {"rank_pattern": {"a": "8"}},
    "layers text": {"layers_to_transform": "all"},
    "layers with regex": {"target_modules": ".*q_proj", "layers_to_transform": [0]},
    "layers pattern with regex": {"target_modules": ".*q_proj", "layers_pattern": "layers"},
    "layers pattern alone": {"layers_pattern": ["layers"]},
    "bias unknown": {"bias": "some"},
    "dora text": {"use_dora": "yes"},
    "corda file": {"corda_config": {"cache_file": "/etc/passwd"}},
    "corda covariance file": {"corda_config": {"covariance_file": "../x"}},
    "auto_mapping text": {"auto_mapping": "os.system"},
}
BAD: dict[str, bytes] = {
    "empty": b"",
    "no json": b"hello",
    "list": b"[]",
    "string": b'"a"',
    "null": b"null",
    "not utf-8": b"\xff\xfe",
    "nan": b'{"peft_type": "LORA", "lora_alpha": NaN}',
    "infinity": b'{"peft_type": "LORA", "lora_alpha": -Infinity}',
    "1e999": json.dumps(config()).encode().replace(b'"lora_alpha": 4', b'"lora_alpha": 1e999'),
    "integer of 5000 digits": b'{"r": ' + b"9" * 5000 + b"}",
    "duplicate key": b'{"peft_type": "LORA", "r": 1, "r": 2}',
    "duplicate key inside": b'{"peft_type": "LORA", "rank_pattern": {"a": 1, "a": 2}}',
    "deep list": b'{"peft_type": "LORA", "x": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "deep object": b'{"peft_type": "LORA", "eva_config": ' + b'{"a":' * 10_000 + b"1" + b"}" * 10_001,
    "too large": b" " * (LIMIT + 1),
    "no type": b"{}",
    **{name: json.dumps(config(**changes)).encode() for name, changes in _MISTYPED.items()},
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_malformed(data: bytes) -> None:
    assert refusal(data)[0] == "bad_config"


@pytest.mark.parametrize("changes", [{"r": 0}, {"r": -1}, {"rank_pattern": {"q_proj": 0}}])
def test_ranks_start_at_one(changes: dict[str, Any]) -> None:
    assert refusal(json.dumps(config(**changes)).encode())[0] == "rank_limit"


_values = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=3)
)
_mutations = st.dictionaries(
    st.sampled_from([*PeftConfig.model_fields, "unknown"]), _values | st.dictionaries(st.text(), _values), max_size=4
)


@settings(max_examples=200, deadline=None)
@given(changes=_mutations)
def test_any_values_are_parsed_or_refused(changes: dict[str, Any]) -> None:
    with contextlib.suppress(AdapterInvalid):
        parse(json.dumps(config(**changes)).encode(), LIMIT)


def test_what_peft_writes_without_a_task_type_is_accepted() -> None:
    """Many real adapters carry it; the class it names is the base's own."""
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}
    assert parse(json.dumps(config(task_type=None, auto_mapping=mapping)).encode(), LIMIT).auto_mapping == mapping


@pytest.mark.parametrize(
    "text",
    ['"lora_alpha": 1e308', '"r": 1' + "0" * 400, '"alpha_pattern": {"q_proj": -1e31}', '"x": [[2e30]]'],
)
def test_numbers_that_no_scale_can_be_made_of_are_refused(text: str) -> None:
    with pytest.raises(AdapterInvalid, match="number beyond") as caught:
        read_fields(b'{"peft_type": "LOHA", ' + text.encode() + b"}", LIMIT)
    assert (caught.value.code, caught.value.param) == ("bad_config", text.split('"')[1])
