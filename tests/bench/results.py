"""What a run has found so far. Every line is printed as it comes, since a run takes minutes."""

import statistics
from collections.abc import Sequence
from typing import Any

from tests.bench import stats


class Results:
    """Rows, ratios between them, and what was left out and why."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.ratios: list[dict[str, Any]] = []
        self.skipped: dict[str, str] = {}
        self.peers: dict[str, dict[str, str]] = {}

    def row(self, section: str, case: str, peer: str, unit: str, runs: Sequence[float], **more: Any) -> None:
        """Runs of one case; `best` is the highest of rates and the lowest of times and sizes."""
        best = max if unit.endswith("/s") else min
        figures = {"median": round(statistics.median(runs), 2), "best": round(best(runs), 2)}
        row = {"section": section, "case": case, "peer": peer, "unit": unit, **figures}
        self.rows.append({**row, **more, "runs": [round(run, 3) for run in runs]})
        extras = "  ".join(f"{key} {value}" for key, value in more.items())
        print(f"{section:11} {case:34} {peer:38} {figures['median']:9.2f} {unit:10} {extras}", flush=True)

    def ratio(self, name: str, ours: Sequence[float], theirs: Sequence[float], *, lower: bool = False) -> None:
        """`lower`: of times, where the best is the lowest."""
        found = {"name": name, **stats.ratio(ours, theirs, lower=lower)}
        self.ratios.append(found)
        print(f"{'ratio':11} {name:73} {found['median']:9.2f}", flush=True)

    def skip(self, what: str, reason: str) -> None:
        self.skipped[what] = reason
        print(f"{'skipped':11} {what}: {reason}", flush=True)
