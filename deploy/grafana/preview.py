"""A picture of the dashboards' panels from a running Prometheus, for where there is no Grafana.

python -m deploy.grafana.preview --prometheus http://127.0.0.1:9090 --seconds 120 --out preview.png
"""

import argparse
import io
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import matplotlib as mpl
from matplotlib import pyplot
from PIL import Image

FOLDER = Path(__file__).parent
COLUMNS = 4
POINTS = 60  # of each line
COLOURS = 48  # a quarter of the bytes, and one sees no difference
VARIABLES = {"$instance": ".*", "$__rate_interval": "15s"}
UNITS: dict[str, Callable[[float], str]] = {
    "percentunit": lambda value: f"{100 * value:.3g} %",
    "bytes": lambda value: f"{value / 1024:.3g} KiB",
    "s": lambda value: f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s",
    "reqps": lambda value: f"{value:.3g}/s",
}


@dataclass(frozen=True, slots=True)
class Line:
    name: str
    times: list[float]
    values: list[float]


def lines(url: str, panel: dict[str, Any], start: float, end: float) -> list[Line]:
    """The lines of a panel between two times in seconds since 1970. Raises HTTPError for what Prometheus refuses."""
    found = []
    for target in panel["targets"]:
        query = target["expr"]
        for name, value in VARIABLES.items():
            query = query.replace(name, value)
        span = {"query": query, "start": start, "end": end, "step": (end - start) / POINTS}
        answer = httpx.get(f"{url}/api/v1/query_range", params=span, timeout=60).raise_for_status()
        for series in answer.json()["data"]["result"]:
            times, values = zip(*((at - end, float(value)) for at, value in series["values"]), strict=True)
            found.append(Line(_legend(target["legendFormat"], series["metric"]), list(times), list(values)))
    return found


def _legend(template: str, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), template)


def draw(url: str, seconds: float, out: Path) -> None:
    """Write a PNG of the panels with lines of all dashboards, over the last so many seconds."""
    mpl.use("Agg")
    dashboards = [
        json.loads((FOLDER / "dashboards" / f"{name}.json").read_text()) for name in ("overview", "adapters", "store")
    ]
    panels = [(d["title"], p) for d in dashboards for p in d["panels"] if p["type"] == "timeseries"]
    rows = -(-len(panels) // COLUMNS)
    figure, axes = pyplot.subplots(rows, COLUMNS, figsize=(4 * COLUMNS, 2.1 * rows), layout="constrained")
    end = time.time()
    for axis, (title, panel) in zip(axes.flat, panels, strict=False):
        for line in lines(url, panel, end - seconds, end):
            axis.plot(line.times, line.values, linewidth=1, label=line.name)
        unit = panel["fieldConfig"]["defaults"]["unit"]
        axis.set_title(
            f"{title.removeprefix('Polyrank').strip(': ').capitalize() or 'Overview'}: {panel['title']}", fontsize=7
        )
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_formatter(lambda value, _, unit=unit: UNITS.get(unit, "{:g}".format)(value))
        axis.tick_params(labelsize=6)
        if any(text for text in axis.get_legend_handles_labels()[1]):
            axis.legend(fontsize=5, ncols=2, frameon=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=70)
    pyplot.close(figure)
    Image.open(drawn).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(out, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", help="its address")
    parser.add_argument("--seconds", type=float, default=1800, help="how far back the picture goes")
    parser.add_argument("--out", type=Path, default=FOLDER / "preview.png")
    given = parser.parse_args()
    draw(given.prometheus, given.seconds, given.out)


if __name__ == "__main__":
    main()
