"""The options of the bench."""

import argparse
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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
