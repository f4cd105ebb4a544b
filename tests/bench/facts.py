"""What the figures of a run depend on: machine, versions, commit, options."""

import os
import platform
import subprocess
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from kernels import dispatch
from tests.bench.options import Options

# Those that decide which kernels a library chooses.
TELLING = ("avx2", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "amx_int8", "asimd", "i8mm")
PACKAGES = ("torch", "transformers", "peft", "safetensors", "tokenizers")


def cpu() -> tuple[str, list[str]]:
    """The processor's name and its telling flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), []
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = (found.get("flags") or found.get("Features") or "").split()
    return found.get("model name") or platform.machine(), [flag for flag in TELLING if flag in flags]


def facts(options: Options) -> dict[str, Any]:
    name, flags = cpu()
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "cpu": name,
        "flags": flags,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "kernels": dispatch.load("cpu"),
        "options": {name: value for name, value in asdict(options).items() if name not in ("paths", "out")},
    }


def _git(*arguments: str) -> str | None:
    found = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else None
