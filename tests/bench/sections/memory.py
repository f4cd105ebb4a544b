"""Bytes in memory of the same adapters in PEFT and in vLLM, each measured in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.bench.line_peer import ROOT
from tests.bench.options import peer_variable
from tests.bench.session import Session

SECONDS = 600  # vLLM compiles at its first start


def peft_bytes(session: Session, adapters: Path) -> dict[str, float] | None:
    """As `peers/peft_memory.py` says; None, with the reason told, where it cannot be measured."""
    if "peft" in session.options.without:
        return None
    return _measured(session, "peft", sys.executable, adapters)


def vllm_bytes(session: Session, adapters: Path, rank: int) -> dict[str, float] | None:
    """As `peers/vllm_memory.py` says, with slots of this rank."""
    if "vllm" in session.options.without:
        return None
    if (python := session.options.paths.get("vllm")) is None:
        session.skip("memory of vllm", f"say where it is with --peer vllm=PATH or {peer_variable('vllm')}")
        return None
    return _measured(session, "vllm", python, adapters, "--rank", str(rank))


def _measured(session: Session, name: str, python: str, adapters: Path, *more: str) -> dict[str, float] | None:
    command = [python, "-m", f"tests.bench.peers.{name}_memory", "--base", str(session.base_folder)]
    command += ["--adapters", str(adapters), *more]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    try:
        ended = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS, check=True
        )
        found: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        session.skip(f"memory of {name}", str(getattr(error, "stderr", None) or error).strip()[-300:])
        return None
    return found
