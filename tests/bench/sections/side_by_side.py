"""This server, its engine alone and every peer on the same requests, in turns: what slows one slows all."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack

from tests.bench import stats
from tests.bench.line_peer import LinePeer
from tests.bench.options import INSTALLED_APART, peer_variable
from tests.bench.peers.llamacpp import LlamaCpp
from tests.bench.rounds import Peer, rounds
from tests.bench.session import Session
from tests.bench.workload import BASE_8, CASES, DISTINCT_8, ONE_8, PREFILL, QUICK_CASES, SAME_8, Case

OURS = "polyrank"


def side_by_side(session: Session) -> None:
    """The sections `throughput` and `prefill`: the peers are started once for both."""
    options = session.options
    with ExitStack() as stack:
        peers = list(_start(session, stack))
        session.peers = {peer.name: peer.facts for peer in peers}
        if "throughput" in options.only:
            runs = rounds(session, options.repeat, peers, CASES if options.full else QUICK_CASES)
            for (case, name), found in runs.items():
                first = [seconds for run in found for seconds in run.first]
                gaps = [seconds for run in found for seconds in run.gaps]
                latency = {**stats.milliseconds("first_token", first), **stats.milliseconds("between_tokens", gaps)}
                session.row("throughput", case.title, name, "tokens/s", [run.rate for run in found], **latency)
            _ratios(session, {key: [run.rate for run in found] for key, found in runs.items()})
        if "prefill" in options.only:
            for (case, name), found in rounds(session, options.repeat, peers, PREFILL).items():
                prompts = [request.prompt for request in case.requests(0)]
                tokens = sum(len(ids) for ids in session.base.tokenizer(prompts)["input_ids"])
                title = f"{case.concurrency} of {tokens // case.concurrency} tokens at once"
                session.row("prefill", title, name, "prompt tokens/s", [tokens / run.seconds for run in found])


def _start(session: Session, stack: ExitStack) -> Iterator[Peer]:
    """Every peer that is there; for the others a line that says why not."""
    options = session.options
    for quantize in options.quantize:
        for dtype in options.dtype:
            kind = ("--quantize", quantize, "--dtype", dtype)
            server = session.server_of(f"{OURS} {quantize} {dtype}", *kind, preload=session.adapters)
            yield stack.enter_context(server)
    kind = ("--quantize", options.quantize[0], "--dtype", options.dtype[0])
    yield from _line_peer(session, stack, f"{OURS} in process", sys.executable, "in_process", *kind)
    if "peft" not in options.without:
        for dtype in ("float32", "bfloat16") if options.full else ("float32",):
            yield from _line_peer(session, stack, f"peft {dtype}", sys.executable, "peft", "--dtype", dtype)
    for name in INSTALLED_APART:
        if name in options.without:
            continue
        if name not in options.paths:
            session.skip(name, f"not given; say where it is with --peer {name}=PATH or {peer_variable(name)}")
        elif name == "llamacpp":
            yield from _llamacpp(session, stack, options.paths[name])
        else:
            yield from _line_peer(session, stack, name, options.paths[name], name, "--work", str(session.work))


def _line_peer(session: Session, stack: ExitStack, name: str, python: str, module: str, *more: str) -> Iterator[Peer]:
    print(f"{'starting':11} {name}", flush=True)
    log = session.scratch / f"{name.replace(' ', '-')}.log"
    arguments = ("--base", str(session.base_folder), "--adapters", str(session.adapters), *more)
    try:
        peer = LinePeer(name, python, f"tests.bench.peers.{module}", *arguments, log=log)
    except (OSError, RuntimeError) as error:
        session.skip(name, str(error))
        return
    stack.callback(peer.close)
    yield peer


def _llamacpp(session: Session, stack: ExitStack, binary: str) -> Iterator[Peer]:
    if session.options.model != "smollm2":
        session.skip("llamacpp", "only the default model comes as a GGUF file")
        return
    heads = {"q_proj": session.base.num_heads, "k_proj": session.base.num_kv_heads}
    try:
        peer = LlamaCpp(binary, session.folders, heads, session.work, session.scratch)
    except (OSError, RuntimeError) as error:
        session.skip("llamacpp", str(error))
        return
    stack.callback(peer.close)
    yield peer


def _ratios(session: Session, rates: dict[tuple[Case, str], list[float]]) -> None:
    """What the issue asks of the figures: ours against each peer, and our own adapters against our own base."""
    names = list(dict.fromkeys(name for _, name in rates))
    for ours in (name for name in names if name.startswith(OURS)):
        for case in (Case(0, 1), BASE_8, Case(0, 16), DISTINCT_8, Case(8, 16)):
            for theirs in (name for name in names if not name.startswith(OURS)):
                # OpenVINO has no batch of different adapters: its best is one adapter for all.
                other = SAME_8 if case == DISTINCT_8 and theirs == "openvino" else case
                if (case, ours) in rates and (other, theirs) in rates:
                    against = f"{theirs} ({other.title})" if other != case else theirs
                    session.ratio(f"{case.title}: {ours} to {against}", rates[case, ours], rates[other, theirs])
        for case in (ONE_8, SAME_8, DISTINCT_8):
            if (case, ours) in rates and (BASE_8, ours) in rates:
                session.ratio(f"{ours}: {case.title} to base", rates[case, ours], rates[BASE_8, ours])
