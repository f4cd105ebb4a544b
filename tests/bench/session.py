"""One run of the bench: its options, the folders it works in, and what it has found so far."""

import argparse
import os
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from server.model.base import BaseModel
from server.model.loader import load_base_model
from tests.bench import stats
from tests.bench.adapters import write_adapters
from tests.bench.our_server import OurServer

SECTIONS = ("throughput", "prefill", "loaded", "zipf", "working-set", "adapters")
PEERS = ("peft", "openvino", "llamacpp", "vllm")
INSTALLED_APART = PEERS[1:]


def peer_variable(name: str) -> str:
    return f"BENCH_{name.upper()}"


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    model: str
    only: tuple[str, ...]
    without: tuple[str, ...]
    paths: Mapping[str, str]  # of peers in environments of their own
    quantize: tuple[str, ...]
    dtype: tuple[str, ...]
    serve: tuple[str, ...]  # more arguments for `polyrank serve`
    full: bool
    repeat: int
    out: Path


def parse(arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Measure this server and its peers side by side; see `tests/bench/README.md`.",
    )
    parser.add_argument("--full", action="store_true", help="all cases and more repeats; without it a few minutes")
    parser.add_argument("--only", help=f"sections, separated by commas: {','.join(SECTIONS)}")
    parser.add_argument("--without", help=f"peers to leave out, separated by commas: {','.join(PEERS)}")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="openvino or vllm: Python of the peer's environment; llamacpp: the llama-server binary. "
        f"Also by {', '.join(map(peer_variable, INSTALLED_APART))}",
    )
    parser.add_argument("--quantize", nargs="+", default=["int8", "none"], help="one server each (default: both)")
    parser.add_argument("--dtype", nargs="+", default=["float32"], help="one server each")
    parser.add_argument("--serve", default="", help="more arguments for our servers, in one word: --serve='--x 1'")
    parser.add_argument("--repeat", type=int, help="rounds (default 2, with --full 5)")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of bench.json and bench.html")
    found = parser.parse_args(arguments)
    only = _words(found.only, SECTIONS, parser) or SECTIONS
    paths = {name: environment[key] for name in INSTALLED_APART if (key := peer_variable(name)) in environment}
    for entry in found.peer:
        name, separator, path = entry.partition("=")
        if name not in INSTALLED_APART or not separator:
            parser.error(f"--peer {entry}: must be NAME=PATH with one of {', '.join(INSTALLED_APART)}")
        paths[name] = path
    return Options(
        model=found.model,
        only=only,
        without=_words(found.without, PEERS, parser),
        paths=paths,
        quantize=tuple(found.quantize),
        dtype=tuple(found.dtype),
        serve=tuple(shlex.split(found.serve)),
        full=found.full,
        repeat=found.repeat or (5 if found.full else 2),
        out=found.out,
    )


def _words(text: str | None, known: Sequence[str], parser: argparse.ArgumentParser) -> tuple[str, ...]:
    words = tuple(text.split(",")) if text else ()
    if unknown := [word for word in words if word not in known]:
        parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(known)}")
    return words


@dataclass
class Session:
    """Rows and ratios as they come; every one is printed at once, since a run takes minutes."""

    options: Options
    scratch: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    ratios: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    peers: dict[str, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.base: BaseModel = load_base_model(self.options.model, dtype=torch.bfloat16)
        # What peers make of the model (a folder, an export) is kept between runs.
        self.work = (self.options.out / "work" / self.base.fingerprint[:16]).absolute()
        self.base_folder = self.work / "base"
        if not self.base_folder.is_dir():
            self.base.model.save_pretrained(self.base_folder)
            self.base.tokenizer.save_pretrained(self.base_folder)
        self.adapters = self.scratch / "adapters"
        self.folders = list(write_adapters(self.adapters, self.base.model))

    def server(self, name: str, *options: str, preload: Path | None = None) -> OurServer:
        """One of our servers in the first of the kinds asked for."""
        kind = ("--quantize", self.options.quantize[0], "--dtype", self.options.dtype[0])
        return self.server_of(name, *kind, *options, preload=preload)

    def server_of(self, name: str, *options: str, preload: Path | None = None) -> OurServer:
        return OurServer(name, self.options.model, self.scratch, *options, *self.options.serve, preload=preload)

    def row(self, section: str, case: str, peer: str, unit: str, runs: Sequence[float], **more: Any) -> None:
        """Runs of one case; `best` is the highest of rates and the lowest of times."""
        best = max if unit.endswith("/s") else min
        figures = {"median": round(statistics.median(runs), 2), "best": round(best(runs), 2)}
        row = {"section": section, "case": case, "peer": peer, "unit": unit, **figures}
        self.rows.append({**row, **more, "runs": [round(run, 3) for run in runs]})
        extras = "  ".join(f"{key} {value}" for key, value in more.items())
        print(f"{section:11} {case:34} {peer:26} {figures['median']:9.2f} {unit:10} {extras}", flush=True)

    def ratio(self, name: str, ours: Sequence[float], theirs: Sequence[float], *, lower: bool = False) -> None:
        """`lower`: of times, where the best is the lowest."""
        found = {"name": name, **stats.ratio(ours, theirs, lower=lower)}
        self.ratios.append(found)
        print(f"{'ratio':11} {name:61} {found['median']:9.2f}", flush=True)

    def skip(self, what: str, reason: str) -> None:
        self.skipped[what] = reason
        print(f"{'skipped':11} {what}: {reason}", flush=True)
