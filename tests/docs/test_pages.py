"""The pages are true: links, files, options, variables, routes and metrics that they name exist, and figures agree."""

import pkgutil
import re
from collections.abc import Iterator
from importlib import import_module

import pytest
from typer.main import get_command

import server.api.routes
from server.cli import app
from server.metrics.names import GROUPS
from server.settings import OTHER_VARIABLES, TABLE_END, TABLE_START, Settings, flag, variable, with_table
from tests.contract.sources import ROOT
from tests.docs.pages import pages, text_of

MORE = [f"{package}/README.md" for package in ("server", "adapters_store", "kernels", "tests", "tests/bench")]
OURS = ("README.md", "deploy/README.md", "docs/")
# Of other programs, named in our columns and texts.
OTHER_FLAGS = {"--build"}


def ours() -> list[str]:
    """Pages that name our own options without a word of which program they are."""
    return [page for page in pages() if page.startswith(OURS) and page != "docs/coming-from.md"]


def slugs(page: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text_of(page), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def flags() -> set[str]:
    """Every option of every command."""
    found = {"--help"} | {flag(name) for name in Settings.model_fields}
    commands = [get_command(app)]
    while commands:
        command = commands.pop()
        found |= {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        commands += getattr(command, "commands", {}).values()
    return found


def routes() -> set[str]:
    found = {"GET /docs", "GET /openapi.json"}
    for module in pkgutil.iter_modules(server.api.routes.__path__):
        router = getattr(import_module(f"server.api.routes.{module.name}"), "router", None)
        for route in router.routes if router else ():
            found |= {f"{method} {re.sub(r'{[^}]+}', 'X', route.path)}" for method in route.methods}
    return found


def metrics() -> set[str]:
    named = [name for group in GROUPS.values() for name in group]
    return {f"{name.name}_total" if name.kind == "counter" else name.name for name in named}


def check_names(text: str, page: str) -> None:
    """Options, routes and metrics in backticks."""
    quoted = " ".join(re.findall(r"`([^`\n]+)`", text))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", quoted)) - OTHER_FLAGS <= flags(), page
    for method, path in re.findall(r"`(GET|PUT|POST|DELETE) (/[^\s`?]*)", text):
        known = routes()
        shown = re.sub(r"\{[^}]+\}|\b[A-Z]+\b", "X", path)
        assert f"{method} {shown}" in known or any(
            re.fullmatch(re.sub(r"\\?\.\\?\.\\?\.", ".*", re.escape(f"{method} {shown}")), each) for each in known
        ), f"{page}: {method} {path}"
    for name in re.findall(r"\b(?:polyrank_|vllm:)[a-z0-9_]+", quoted):
        assert name in metrics(), f"{page}: {name}"


def columns(page: str, number: int) -> Iterator[str]:
    for line in text_of(page).splitlines():
        if line.startswith("|"):
            yield line.strip("|").split(" | ")[number]


@pytest.mark.parametrize("page", ours())
def test_names_exist(page: str) -> None:
    check_names(text_of(page), page)


def test_our_side_of_the_comparison_exists() -> None:
    check_names("\n".join(columns("docs/coming-from.md", -1)), "docs/coming-from.md")


@pytest.mark.parametrize("page", [*pages(), *MORE])
def test_links_lead_somewhere(page: str) -> None:
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", text_of(page)):
        to = (ROOT / page).parent / target if target else ROOT / page
        assert to.exists(), target
        if anchor:
            assert anchor in slugs(to.resolve().relative_to(ROOT).as_posix()), f"{target}#{anchor}"


@pytest.mark.parametrize("page", [*pages(), *MORE])
def test_files_named_exist(page: str) -> None:
    for path in re.findall(r"`((?:server|adapters_store|kernels|tests|deploy|docs)/[\w./-]+\.\w+)`", text_of(page)):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("page", pages())
def test_variables_named_exist(page: str) -> None:
    before, _, rest = text_of(page).partition(TABLE_START)
    known = {variable(name) for name in Settings.model_fields} | OTHER_VARIABLES
    assert set(re.findall(r"POLYRANK_[A-Z_]+", before + rest.partition(TABLE_END)[2])) <= known


def test_the_table_of_options_is_current() -> None:
    assert with_table(text_of("docs/options.md")) == text_of("docs/options.md"), "run `make fmt`"


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    text = text_of("README.md")
    assert len(text.splitlines()) <= 150
    assert [page for page in pages() if page.startswith("docs/") and f"]({page})" not in text] == []
    rows = re.findall(r"^\| \[?`([\w/]+)/`", text, re.MULTILINE)
    tops = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {"docs", "deploy"}
    assert tops <= set(rows)
    assert all((ROOT / row).is_dir() for row in rows)


@pytest.mark.parametrize("page", ["README.md", "docs/coming-from.md"])
def test_figures_beside_others_are_those_of_the_bench(page: str) -> None:
    """A row of the README is one of the bench's; in texts the numbers stand in its rows."""
    measured = text_of("tests/bench/README.md")
    row = re.compile(r"^\| (?:Polyrank|PEFT|OpenVINO|llama.cpp|vLLM)\b.*\d\)? \|$", re.MULTILINE)
    rows = row.findall(measured)
    assert set(row.findall(text_of(page))) <= set(rows)
    known = set(re.findall(r"\d+", " ".join(rows)))
    dated = [" ".join(part.split()) for part in text_of(page).split("\n\n") if "2026" in part]
    assert any("26 November 2026" in part for part in dated)
    for part in dated:
        told = re.sub(r"26 November 2026|8 distinct|float32|bfloat16|int8|Q8_0|vLLM 0\.32", "", part)
        for sentence in re.findall(r"(?:T|On t)wo (?:CPU )?cores, .*?(?:\(|\. |$)", told):
            numbers = re.findall(r"\d+", sentence)
            assert numbers
            assert set(numbers) <= known, sentence


def test_every_alert_has_its_cure() -> None:
    alerts = re.findall(r"- alert: (\w+)", (ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())
    cures = dict(re.findall(r"^\| (Polyrank\w+) \(\w+\) \| .+ \| (.{40,}) \|$", text_of("deploy/README.md"), re.M))
    assert set(cures) == set(alerts)
    assert len(alerts) > 10
    runbook = text_of("deploy/README.md").partition("\n## Alerts\n")[0]
    assert set(re.findall(r"\bPolyrank[A-Z]\w+", runbook)) <= set(alerts)


def test_a_wrong_name_is_found() -> None:
    for text in ("`--no-such-option`", "`GET /no/such/route`", "`polyrank_no_such_metric`"):
        with pytest.raises(AssertionError):
            check_names(text, "")
