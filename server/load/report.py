"""What a run showed, as numbers, as a table for a terminal and as a picture."""

import itertools
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server.load.arithmetic import percentile
from server.load.run import Outcome

SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
PIPED_WIDTH = 160  # columns, where there is no terminal whose width counts
TITLES = {"ttft": "first token", "itl": "between tokens", "e2e": "whole answer"}


def first_tokens(outcomes: Sequence[Outcome]) -> list[float]:
    return [each.tokens[0] for each in outcomes if not each.error and each.tokens]


def gaps(outcomes: Sequence[Outcome]) -> list[float]:
    whole = [each.tokens for each in outcomes if not each.error]
    return [after - before for tokens in whole for before, after in itertools.pairwise(tokens)]


def ends(outcomes: Sequence[Outcome]) -> list[float]:
    return [each.seconds for each in outcomes if not each.error]


def summary(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """All of it, and by model. Times in milliseconds; rates count whole answers only."""
    models = sorted({each.model for each in outcomes})
    by_model = {model: _of([each for each in outcomes if each.model == model], seconds) for model in models}
    return {"seconds": round(seconds, 6), **_of(outcomes, seconds), "models": by_model}


def _of(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    whole = [each for each in outcomes if not each.error]
    tokens = {"input": sum(each.input_tokens for each in whole), "output": sum(each.output_tokens for each in whole)}
    span = seconds or 1.0
    return {
        "requests": len(outcomes),
        "answered": len(whole),
        "errors": dict(sorted(Counter(each.error for each in outcomes if each.error).items())),
        "input_tokens": tokens["input"],
        "output_tokens": tokens["output"],
        "requests_per_second": round(len(whole) / span, 3),
        "output_tokens_per_second": round(tokens["output"] / span, 2),
        "ttft_ms": _spread(first_tokens(whole)),
        "itl_ms": _spread(gaps(whole)),
        "e2e_ms": _spread(ends(whole)),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    found = {name: round(percentile(values, share) * 1e3, 2) for name, share in SHARES.items()}
    return {"mean": round(sum(values) / len(values) * 1e3, 2), **found}


def show(found: dict[str, Any]) -> None:
    """Tables on stdout: the whole, the times, the models if there are several, and the errors."""
    from rich.console import Console
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=PIPED_WIDTH)
    rates = f"{found['requests_per_second']:.2f} answers/s, {found['output_tokens_per_second']:.1f} tokens/s"
    console.print(f"{found['answered']} of {found['requests']} answered in {found['seconds']:.1f} s: {rates}")
    times = Table("ms", "mean", *SHARES, title=None)
    for name, title in TITLES.items():
        spread = found[f"{name}_ms"]
        times.add_row(title, *(_number(spread.get(column)) for column in ("mean", *SHARES)))
    console.print(times)
    if len(found["models"]) > 1:
        console.print(_models(found["models"]))
    if found["errors"]:
        errors = Table("error", "requests")
        for code, count in found["errors"].items():
            errors.add_row(code, str(count))
        console.print(errors)


def _models(models: dict[str, Any]) -> Any:
    from rich.table import Table

    heads = ("model", "requests", "errors", "tokens/s", "first token p50", "p99", "between p50", "whole p50", "p99")
    table = Table(*heads)
    for name, own in models.items():
        first, gap, whole = own["ttft_ms"], own["itl_ms"], own["e2e_ms"]
        times = (first.get("p50"), first.get("p99"), gap.get("p50"), whole.get("p50"), whole.get("p99"))
        counts = (str(own["requests"]), str(sum(own["errors"].values())), _number(own["output_tokens_per_second"]))
        table.add_row(name, *counts, *map(_number, times))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """The share of requests (of gaps, for the time between tokens) below each time."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for axis, (name, values) in zip(
        axes, zip(TITLES, (first_tokens(outcomes), gaps(outcomes), ends(outcomes)), strict=True), strict=True
    ):
        ordered = sorted(value * 1e3 for value in values)
        axis.step(ordered, [(place + 1) / len(ordered) for place in range(len(ordered))], where="post")
        axis.set(title=TITLES[name], xlabel="ms", ylabel="share below", ylim=(0, 1))
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
