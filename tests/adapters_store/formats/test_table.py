"""The tables of methods: complete, from the methods themselves, and up to date."""

import pytest
from peft import PeftType

from adapters_store.formats import methods, table
from adapters_store.formats.papers import PAPERS
from adapters_store.formats.peft_types import PEFT_TYPES


def test_every_type_of_peft_is_told() -> None:
    assert {each.value for each in PeftType} == PEFT_TYPES
    assert {each.name for each in table.types()} >= PEFT_TYPES


def test_the_file_is_up_to_date() -> None:
    text = table.FILE.read_text()
    assert table.with_tables(text) == text, "run `python -m adapters_store.formats.table`"


def test_a_file_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="methods: start"):
        table.with_tables("# Methods")


def test_every_paper_is_told_with_a_reason() -> None:
    told = table.papers()
    assert len(told) == len({each.name for each in told}) == 50
    assert all(each.note and each.source for each in told)
    ours = {method.kind: method for method in methods.METHODS}
    for paper, each in zip(PAPERS, told, strict=True):
        for kind in paper.kinds:
            if kind in ours:
                assert ours[kind].note in each.note
                assert each.status in ("native", "folded")


def test_a_paper_without_an_importer_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "METHODS", tuple(each for each in methods.METHODS if each.kind != "nola"))
    (nola,) = [each for each in table.papers() if each.name == "NOLA"]
    assert (nola.status, nola.note) == ("declined", "There is no importer yet.")


def test_types_say_what_select_does() -> None:
    """Served types find a method; declined ones are refused."""
    for each in table.types():
        name = each.name.partition(" ")[0]
        if each.status == "declined":
            with pytest.raises(Exception, match=name):
                methods.select({"peft_type": name})
        elif "(" not in each.name:
            found = methods.select({"peft_type": name})
            assert (found is None) == (name == "LORA")


def test_nothing_is_told_twice() -> None:
    names = [each.name for each in table.known()]
    assert len(names) == len(set(names))
    assert "NOLA" in names
    assert "LORA_XS" in names  # of no paper in the list
