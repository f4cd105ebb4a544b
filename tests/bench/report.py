"""The results for people: a table for the terminal, and a page with a bar for every figure."""

from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from typing import Any

Rows = Sequence[dict[str, Any]]
BAR, STEP, LEFT, WIDTH = 16, 20, 260, 860  # pixels
FIGURES = ("section", "case", "peer", "unit", "median", "best", "runs")  # what every row has
STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em; color: #222 }
h2 { margin-top: 2em } h3 { font-size: 1em; margin: 1.2em 0 .3em }
table { border-collapse: collapse } td, th { padding: .15em .8em .15em 0; text-align: left; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums }
svg text { font: 12px system-ui, sans-serif; fill: #222 } .ours { fill: #2563a8 } .theirs { fill: #a9b4c0 }
"""


def table(rows: Rows, ratios: Rows) -> str:
    lines = [f"\n{'section':11} {'case':34} {'peer':38} {'median':>10} {'best':>10}"]
    for row in rows:
        figures = f"{row['median']:10.2f} {row['best']:10.2f} {row['unit']}"
        lines.append(f"{row['section']:11} {row['case']:34} {row['peer']:38} {figures}")
    lines.append(f"\n{'ratio':84} {'median':>10} {'best':>10}")
    lines += [f"{ratio['name']:84} {ratio['median']:10.3f} {ratio['best']:10.3f}" for ratio in ratios]
    return "\n".join(lines)


def page(results: dict[str, Any]) -> str:
    """One HTML file that needs nothing else."""
    facts = results["facts"]
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>Polyrank bench</title><style>{STYLE}</style>",
        f"<h1>Polyrank bench, {escape(str(facts['commit']))}</h1>",
        "<p>Bars are medians, lines the best run. All figures are of one run; peers took turns.</p>",
        *_sections(results["rows"]),
        "<h2>Ratios</h2>",
        _cells(("", "median", "best"), [(each["name"], each["median"], each["best"]) for each in results["ratios"]]),
        "<h2>Peers</h2>",
        _cells(("", ""), [(name, _words(found)) for name, found in results["peers"].items()]),
        _cells(("", ""), [(f"{name} skipped", reason) for name, reason in results["skipped"].items()]),
        "<h2>Machine</h2>",
        _cells(("", ""), [(name, _words(value)) for name, value in facts.items()]),
        "</html>",
    ]
    return "\n".join(parts)


def _sections(rows: Rows) -> Iterator[str]:
    for section, of_section in groupby(rows, key=lambda row: str(row["section"])):
        yield f"<h2>{escape(section)}</h2>"
        for (case, unit), bars in groupby(of_section, key=lambda row: (str(row["case"]), str(row["unit"]))):
            yield f"<h3>{escape(case)} ({escape(unit)})</h3>"
            group = list(bars)
            yield _bars(group)
            yield _more(group)


def _bars(rows: Rows) -> str:
    most = max(max(row["median"], row["best"]) for row in rows) or 1
    scale = (WIDTH - LEFT - 330) / most
    marks = []
    for number, row in enumerate(rows):
        top, base = number * STEP, number * STEP + 12
        kind = "theirs" if row["section"] in ("throughput", "prefill") and "polyrank" not in row["peer"] else "ours"
        best = LEFT + row["best"] * scale
        marks += [
            f"<text x='{LEFT - 8}' y='{base}' text-anchor='end'>{escape(row['peer'])}</text>",
            f"<rect class='{kind}' x='{LEFT}' y='{top}' width='{row['median'] * scale:.1f}' height='{BAR}'/>",
            f"<path d='M{best:.1f} {top}v{BAR}' stroke='#222'/>",
            f"<text x='{LEFT + most * scale + 8:.0f}' y='{base}'>{row['median']:.1f}</text>",
        ]
    return f"<svg viewBox='0 0 {WIDTH} {len(rows) * STEP}' width='{WIDTH}'>{''.join(marks)}</svg>"


def _more(rows: Rows) -> str:
    """What some rows have beside their rate: latencies, loads."""
    names = list(dict.fromkeys(name for row in rows for name in row if name not in FIGURES))
    lines = [[row["peer"], *(row.get(name, "") for name in names)] for row in rows if any(map(row.get, names))]
    return _cells(["", *(name.replace("_", " ") for name in names)], lines) if names else ""


def _cells(heads: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(map(_cell, line))}</tr>" for line in lines)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"<td class='number'>{value:.2f}</td>"
    return f"<td>{escape(str(value))}</td>"


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(each)}" for name, each in value.items())
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
