"""The packages' READMEs: every module and folder is in its map, and what they name exists."""

import re

import pytest

from deploy import maps
from tests.contract.sources import ROOT

PACKAGES = (*maps.MAPPED, "tests")


def text(package: str) -> str:
    return (ROOT / package / "README.md").read_text()


@pytest.mark.parametrize("package", maps.MAPPED)
def test_the_map_is_current(package: str) -> None:
    assert maps.current(package, text(package)) == text(package), "run `make fmt`"


@pytest.mark.parametrize("package", maps.MAPPED)
def test_every_module_is_in_the_map(package: str) -> None:
    """Without the writer's help."""
    shown: set[str] = set()
    folder = ""
    for line in text(package).partition(maps.START)[2].splitlines():
        if heading := re.match(r"### `([\w/]+)/`$", line):
            folder = heading[1]
        elif row := re.match(r"\| `(\w+\.py)` \| \S.*[^.] \|$", line):
            shown.add(f"{folder}/{row[1]}")
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")}
    assert shown == {path for path in there if not path.endswith("__init__.py")}


def test_every_folder_of_tests_is_in_their_map() -> None:
    rows = re.findall(r"^\| `([\w/]+)/` \| \S", text("tests"), re.MULTILINE)
    assert len(rows) == len(set(rows))
    there = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("__init__.py")}
    assert set(rows) | {"tests"} == there


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_named_exists(package: str) -> None:
    said = text(package).partition("<!-- map -->")[0]
    named = re.findall(r"`([\w/]+(?:/|\.(?:py|md|cpp|h)))`", said)
    assert named
    for path in named:
        assert any((base / path).exists() for base in (ROOT, ROOT / package)), path
    for module in re.findall(r"`(\w+(?:\.\w+)+)`", said):
        if module.partition(".")[0] in PACKAGES:
            assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text(package)):
        assert (ROOT / package / target).exists(), target


def test_a_module_without_docstring_is_told() -> None:
    with pytest.raises(ValueError, match="has no docstring"):
        maps.summary(ROOT / "tests" / "docs" / "__init__.py")
