"""The README is true: folders, options, commands and files that it names exist."""

import re
import shlex

import pytest
from typer.main import get_command

from server.cli import app
from server.settings import TABLE_START, variable, with_table
from tests.contract.sources import ROOT

TEXT = (ROOT / "README.md").read_text()


def section(title: str) -> str:
    match = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert match, f"README.md has no section {title}"
    return match.group(1)


def bash_lines() -> list[str]:
    """Every command of every bash block, continuation lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert blocks
    text = "\n".join(blocks).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("line", bash_lines())
def test_commands(line: str) -> None:
    words = shlex.split(line, comments=True)
    for path in re.findall(r"\bdeploy/[\w./-]+", line):
        assert (ROOT / path).exists(), path
    command = words[0].removeprefix(".venv/bin/")
    if command == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words[1]
    elif command == "polyrank":
        found = get_command(app).commands[words[1]]  # type: ignore[attr-defined]
        found = found.commands[words[2]] if hasattr(found, "commands") else found
        options = {name for parameter in found.params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options
    else:
        assert command in ("curl", "docker", "python", "cd", "git")


def test_the_table_of_options_is_current() -> None:
    assert with_table(TEXT) == TEXT, "run `make fmt`"


def test_the_map_shows_every_package() -> None:
    rows = re.findall(r"^\| `([\w/.]+)/` \|", section("Map"), re.MULTILINE)
    assert not [row for row in rows if not (ROOT / row).is_dir()]
    for top in ("server", "adapters_store", "kernels"):
        packages = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / top).rglob("__init__.py")}
        assert packages <= set(rows)


def test_modules_named_exist() -> None:
    for path in re.findall(r"`((?:server|adapters_store|kernels|tests|deploy)/[\w./-]+\.\w+)`", TEXT):
        assert (ROOT / path).is_file(), path


def test_variables_named_exist() -> None:
    before = TEXT.partition(TABLE_START)[0]
    from server.settings import OTHER_VARIABLES, Settings

    known = {variable(name) for name in Settings.model_fields} | OTHER_VARIABLES
    assert set(re.findall(r"POLYRANK_[A-Z_]+", before)) <= known


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target
