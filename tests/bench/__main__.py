"""One run that measures this server, its engine in process and its peers side by side: `make bench`."""

import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import transformers

from tests.bench.facts import facts
from tests.bench.options import parse
from tests.bench.report import page, table
from tests.bench.sections.adapters import adapters
from tests.bench.sections.loaded import loaded
from tests.bench.sections.side_by_side import side_by_side
from tests.bench.sections.working_set import working_set
from tests.bench.sections.zipf import zipf
from tests.bench.session import Session

RUN: dict[Callable[[Session], None], set[str]] = {
    side_by_side: {"throughput", "prefill"},
    loaded: {"loaded"},
    zipf: {"zipf"},
    working_set: {"working-set"},
    adapters: {"adapters"},
}


def main() -> None:
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as an exception, so that every peer is stopped
    transformers.utils.logging.disable_progress_bar()  # its bars would stand between the rows
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="polyrank-bench-") as scratch:
        session = Session(options, Path(scratch))
        for measure, sections in RUN.items():
            if sections & set(options.only):
                measure(session)
                # After each section: a run that is cut short keeps what it has.
                write(session, time.monotonic() - start)
    print(table(session.rows, session.ratios))
    print(f"\n{options.out / 'bench.json'} and {options.out / 'bench.html'} hold this run.")


def write(session: Session, seconds: float) -> None:
    results = {
        "facts": {**facts(session.options), "seconds": round(seconds)},
        "peers": session.peers,
        "skipped": session.skipped,
        "rows": session.rows,
        "ratios": session.ratios,
    }
    (session.options.out / "bench.json").write_text(json.dumps(results, indent=2) + "\n")
    (session.options.out / "bench.html").write_text(page(results))


if __name__ == "__main__":
    main()
