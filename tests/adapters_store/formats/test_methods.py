"""Which methods are known."""

import pytest
from peft import PeftType

from adapters_store.errors import AdapterInvalid
from adapters_store.formats.methods import DECLINED, METHODS, select

SERVED = {method.peft_type for method in METHODS}


@pytest.mark.parametrize("name", [member.value for member in PeftType])
def test_every_method_of_peft_is_served_or_declined(name: str) -> None:
    assert (name in SERVED or name == "LORA") != (name in DECLINED)


@pytest.mark.parametrize("name", [*DECLINED, "SOMETHING"])
def test_what_is_declined_is_refused_with_its_reason(name: str) -> None:
    with pytest.raises(AdapterInvalid, match=name) as caught:
        select({"peft_type": name})
    assert caught.value.code == "feature_unsupported"
    assert DECLINED.get(name, "no such method is known here") in caught.value.message


def test_kinds_are_unique_and_described() -> None:
    assert len({method.kind for method in METHODS}) == len(METHODS)
    assert all(method.note.endswith(".") and method.source for method in METHODS)


def test_a_plain_lora_is_none_of_them() -> None:
    assert select({"peft_type": "LORA", "use_dora": False, "trainable_token_indices": None}) is None
