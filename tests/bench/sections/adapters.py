"""One adapter: how long its upload and its first request take, and how much memory it holds, here and in peers."""

import os
import time
from pathlib import Path

from server.client import Client
from tests.bench.adapters import write_adapters
from tests.bench.our_server import OurServer
from tests.bench.peers.protocol import Request
from tests.bench.sections.memory import peft_bytes, vllm_bytes
from tests.bench.session import Session
from tests.bench.workload import RANKS

COLD, WARM, RESIDENT = "not in memory, from disk", "not in memory, file cached", "in memory"


def adapters(session: Session) -> None:
    """Each adapter is asked for twice; half of them after its file was thrown out of the page cache."""
    each = 8 if session.options.full else 4
    folder_of = {rank: session.scratch / f"rank-{rank}" for rank in RANKS}
    written = {
        rank: list(write_adapters(folder, session.base.model, each, ranks=(rank,), prefix=f"r{rank}-"))
        for rank, folder in folder_of.items()
    }
    slots = vllm_bytes(session, folder_of[max(RANKS)], max(RANKS))  # its slots are of one rank, that of the largest
    for rank, folders in written.items():
        with session.server(f"rank {rank}", "--adapter-memory", "2GiB") as server:
            _upload(session, server, folders, rank)
            server.run([Request("The first request of all is slower.", None, 2)])
            before, memory = server.counters()["adapter_bytes_used"], server.resident_memory()
            _ask(session, server, [path.name for path in folders], rank)
            pool = (server.counters()["adapter_bytes_used"] - before) / each
            growth = (server.resident_memory() - memory) / each
            own = server.adapter_bytes(folders[0].name)
        sizes = {"own": own, "pool": pool, "process growth": growth}
        for what, size in sizes.items():
            session.row("memory", f"rank {rank}, all linears", what, "MiB", [size / 2**20])
        session.ratio(f"memory of rank {rank}: pool to the adapter's own bytes", [pool], [own], lower=True)
        _against_peers(session, rank, sizes, peft_bytes(session, folder_of[rank]), slots)


def _against_peers(
    session: Session, rank: int, ours: dict[str, float], peft: dict[str, float] | None, vllm: dict[str, float] | None
) -> None:
    """ours: bytes, as the rows above; peft and vllm: as their scripts say."""
    pairs = []
    if peft is not None:
        pairs = [("pool", "peft parameters", peft["parameters"]), ("process growth", "peft growth", peft["growth"])]
    if vllm is not None:
        pairs.append(("pool", f"vllm slot of rank {max(RANKS)}", vllm["slot"]))
    for own, peer, size in pairs:
        session.row("memory", f"rank {rank}, all linears", peer, "MiB", [size / 2**20])
        session.ratio(f"memory of rank {rank}: our {own} to {peer}", [ours[own]], [size], lower=True)


def _upload(session: Session, server: OurServer, folders: list[Path], rank: int) -> None:
    milliseconds = []
    with Client(server.url) as client:
        for folder in folders:
            start = time.perf_counter()
            client.upload(folder.name, folder, replace=False, progress=lambda *_: None)
            milliseconds.append((time.perf_counter() - start) * 1e3)
    session.row("adapters", f"rank {rank}, all linears", "upload and checks", "ms", milliseconds)


def _ask(session: Session, server: OurServer, names: list[str], rank: int) -> None:
    firsts: dict[str, list[float]] = {COLD: [], WARM: [], RESIDENT: []}
    for number, name in enumerate(names):
        files = [path for path in server.store.rglob("*") if path.is_file()]
        for path in files:
            if number % 2:
                _forget(path)
            else:
                path.read_bytes()
        for state in (COLD if number % 2 else WARM, RESIDENT):
            run = server.run([Request(f"{number} {state}: how long does this take?", name, 1)])
            firsts[state].append(run.first[0] * 1e3)
    for state, found in firsts.items():
        session.row("adapters", f"rank {rank}, all linears", f"first token, {state}", "ms", found)


def _forget(path: Path) -> None:
    """Drop the file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
