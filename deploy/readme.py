"""The tables of deploy/README.md: every metric and every alert. `python -m deploy.readme` brings them up to date."""

import re
from pathlib import Path

import yaml

from server.metrics.names import GROUPS

README = Path(__file__).parent / "README.md"
ALERTS = Path(__file__).parent / "prometheus" / "alerts.yml"


def metrics() -> str:
    """One table for each group of metrics."""
    parts = []
    for title, group in GROUPS.items():
        rows = [f"### {title}", "", "| metric | type | labels | meaning |", "|---|---|---|---|"]
        for name in group:
            shown = f"{name.name}_total" if name.kind == "counter" else name.name
            labels = ", ".join(f"`{label}`" for label in name.labels)
            rows.append(f"| `{shown}` | {name.kind} | {labels} | {name.text} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def alerts() -> str:
    """When each alert fires, and what to do then."""
    rows = ["| alert | fires when | what to do |", "|---|---|---|"]
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        for rule in group["rules"]:
            when = f"`{rule['expr']}`" + (f" for {rule['for']}" if "for" in rule else "")
            rows.append(
                f"| {rule['alert']} ({rule['labels']['severity']}) | {when} | {rule['annotations']['runbook']} |"
            )
    return "\n".join(rows)


def current(text: str) -> str:
    """The text with the tables as they are now between their markers."""
    for mark, table in (("metrics", metrics()), ("alerts", alerts())):
        pattern = re.compile(f"<!-- {mark} -->.*<!-- end of {mark} -->", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"{README.name} lacks the markers of {mark}")
        before, after = pattern.split(text)
        text = f"{before}<!-- {mark} -->\n{table}\n<!-- end of {mark} -->{after}"
    return text


def main() -> None:
    README.write_text(current(README.read_text()))


if __name__ == "__main__":
    main()
