"""Panels of Grafana from a few words each. No panel names a server or a data source: both are variables."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WIDTH = 24  # columns of a dashboard
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
SERVER = 'instance=~"$instance"'  # what every series is selected by


@dataclass(frozen=True, slots=True)
class Query:
    """An expression, and what its lines are called (`{{label}}` stands for a label's value)."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """unit: Grafana's name of it; stat: one number, instead of lines over time."""

    title: str
    text: str
    queries: Sequence[Query]
    unit: str = "short"
    stat: bool = False
    stacked: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Columns and rows."""
        return (4, 4) if self.stat else (8, 8)


@dataclass(frozen=True, slots=True)
class Dashboard:
    """uid: never changed, for links hold it."""

    uid: str
    title: str
    panels: Sequence[Panel]


def stat(title: str, text: str, expr: str, unit: str = "short") -> Panel:
    return Panel(title, text, [Query(expr)], unit, stat=True)


def rate(metric: str, by: str = "", labels: str = "") -> str:
    """What a counter gains in a second, over all servers; by: labels to keep."""
    selected = f"{metric}{{{', '.join(filter(None, (labels, SERVER)))}}}"
    return f"sum{f' by ({by})' if by else ''} (rate({selected}[$__rate_interval]))"


def total(gauge: str, by: str = "", labels: str = "") -> str:
    """A gauge summed over all servers."""
    selected = f"{gauge}{{{', '.join(filter(None, (labels, SERVER)))}}}"
    return f"sum{f' by ({by})' if by else ''} ({selected})"


def worst(gauge: str) -> str:
    """The largest value of any server."""
    return f"max ({gauge}{{{SERVER}}})"


def quantiles(histogram: str, *shares: float) -> list[Query]:
    return [
        Query(f"histogram_quantile({share:g}, {rate(f'{histogram}_bucket', 'le')})", f"p{share * 100:g}")
        for share in shares or (0.5, 0.95, 0.99)
    ]


def mean(histogram: str, by: str = "", labels: str = "") -> str:
    return f"{rate(f'{histogram}_sum', by, labels)} / {rate(f'{histogram}_count', by, labels)}"


def share(part: str, *parts: str) -> str:
    """Of one rate in the sum of several."""
    return f"{part} / ({' + '.join((part, *parts))})"


def render(dashboard: Dashboard) -> dict[str, Any]:
    """The JSON that Grafana loads."""
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "tags": ["polyrank"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "links": [{"type": "dashboards", "tags": ["polyrank"], "title": "Polyrank", "asDropdown": True}],
        "templating": {"list": [_datasource(), _instance()]},
        "panels": [_panel(number, place, panel) for number, (place, panel) in enumerate(_laid_out(dashboard), 1)],
    }


def _laid_out(dashboard: Dashboard) -> list[tuple[dict[str, int], Panel]]:
    """Panels from left to right, in rows."""
    found = []
    x = y = height = 0
    for panel in dashboard.panels:
        w, h = panel.size
        if x + w > WIDTH or h != height:
            x, y = 0, y + height
        height = h
        found.append(({"x": x, "y": y, "w": w, "h": h}, panel))
        x += w
    return found


def _panel(number: int, place: dict[str, int], panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.stacked:
        defaults["custom"] = {"stacking": {"mode": "normal"}, "fillOpacity": 30}
    if panel.unit == "percentunit":
        defaults["max"] = 1
    return {
        "id": number,
        "type": "stat" if panel.stat else "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": DATASOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": [
            {"refId": "ABCDEFGH"[index], "datasource": DATASOURCE, "expr": query.expr, "legendFormat": query.legend}
            for index, query in enumerate(panel.queries)
        ],
        "options": _STAT if panel.stat else _LINES,
    }


_STAT = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "none", "graphMode": "area"}
_LINES = {
    "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
    "tooltip": {"mode": "multi", "sort": "desc"},
}


def _datasource() -> dict[str, Any]:
    return {
        "name": "datasource",
        "type": "datasource",
        "query": "prometheus",
        "label": "Data source",
        "current": {},
        "hide": 0,
    }


def _instance() -> dict[str, Any]:
    return {
        "name": "instance",
        "type": "query",
        "label": "Server",
        "datasource": DATASOURCE,
        "query": {"query": "label_values(polyrank_running, instance)", "refId": "instance"},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }
