"""Build the C++ kernels once per machine and load them.

The library lands in the user's cache (`$POLYRANK_CACHE`, else `$XDG_CACHE_HOME/polyrank`, else
`~/.cache/polyrank`) under a name made of the sources, the torch version and the CPU, so an upgrade or another
machine builds its own. `$POLYRANK_KERNELS=reference` skips it: every operation then runs in plain torch.

The compiler is called directly and not through `torch.utils.cpp_extension.load`: that needs ninja on PATH, which a
virtual environment's python does not put there, and it starts ninja and imports setuptools even when nothing changed.
"""

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
SHARED = "torch_headers.h"  # compiled once for all sources
STALE = 3600.0  # seconds after which nobody works any more in a build's folder
KERNELS_VARIABLE = "POLYRANK_KERNELS"
CACHE_VARIABLE = "POLYRANK_CACHE"
CHOICES = ("auto", "reference")


class BuildFailed(Exception):
    """No compiler, or the compiler refused; the message says what it said."""


def load() -> bool:
    """Register the kernels as `torch.ops.polyrank.*`, building them first if need be; False: use the reference."""
    choice = os.environ.get(KERNELS_VARIABLE, "auto")
    if choice not in CHOICES:
        raise ValueError(f"{KERNELS_VARIABLE}={choice!r}: expected one of {', '.join(CHOICES)}")
    if choice == "reference":
        return False
    try:
        torch.ops.load_library(library())  # type: ignore[no-untyped-call]
    except (BuildFailed, OSError) as error:
        reason = f"{error}: {error.__cause__}" if error.__cause__ else error
        logger.warning("CPU kernels are not available, plain torch is used instead (many times slower): %s", reason)
        return False
    return True


def library() -> Path:
    """Path of the built library; builds it if it is not in the cache."""
    path = cache_folder() / f"kernels-{_digest()}.so"
    if path.exists():
        return path
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _lock(path.with_suffix(".lock")):
        if not path.exists():  # another process may have built it while this one waited
            # A warning, because it must be seen before logging is configured: the first start would seem to hang.
            logger.warning("Building CPU kernels: about a minute on two idle cores, once; cached in %s", path.parent)
            _build(path)
    return path


def cache_folder() -> Path:
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polyrank"


def _digest() -> str:
    digest = hashlib.sha256()
    for path in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h"), Path(__file__)]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    for part in (torch.__version__, _cpu(), *_compile_flags()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:24]


def cpu_key() -> str:
    """Short name of this kind of CPU."""
    return hashlib.sha256(_cpu().encode()).hexdigest()[:12]


def _cpu() -> str:
    """What `-march=native` depends on; a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "CPU part", "Features")
    return "\n".join([platform.machine(), *sorted({line for line in lines if line.startswith(wanted)})])


def _compile_flags() -> list[str]:
    capability = torch.backends.cpu.get_cpu_capability()
    flags = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wno-psabi"]
    # Where at::vec has no explicit fused multiply-add, the compiler would fuse in some tile sizes and not in others:
    # a row's bits would depend on its batch-mates.
    flags.append("-ffp-contract=off")
    flags += [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    if sys.platform == "darwin":  # no OpenMP in Apple's compiler: at::parallel_for runs on one thread
        return [*flags, "-mcpu=native"]
    return [*flags, "-march=native", "-fopenmp"]


def _link_flags() -> list[str]:
    # Not -fopenmp: the OpenMP runtime comes with torch's library. The system's own, linked as a second one, would
    # bring a second pool of threads that fights for the same cores.
    from torch.utils.cpp_extension import library_paths

    folders = [f"-L{path}" for path in library_paths()]
    flags = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    return ["-shared", *flags, *folders, "-ltorch_cpu", "-lc10"]


def _build(target: Path) -> None:
    command = shlex.split(os.environ.get("CXX", "c++"))
    if not command or shutil.which(command[0]) is None:
        raise BuildFailed(f"no C++ compiler: {' '.join(command)!r} is not on PATH (set CXX, or install g++)")
    from torch.utils.cpp_extension import include_paths  # costs 0.15 s and is needed for a build only

    _clear_away(target.parent)
    includes = [part for path in include_paths() for part in ("-isystem", path)]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as folder:
        compiling = [*command, *_compile_flags(), *includes]
        shared = _precompile(compiling, Path(folder))

        def compile_one(source: Path) -> str:
            unit = str(Path(folder, source.stem + ".o"))
            _run([*compiling, *shared, "-c", str(source), "-o", unit])
            return unit

        with ThreadPoolExecutor(os.cpu_count()) as workers:
            largest_first = sorted(SOURCES.glob("*.cpp"), key=lambda source: source.stat().st_size, reverse=True)
            units = list(workers.map(compile_one, largest_first))
        linked = Path(folder, target.name)
        _run([*command, *units, *_link_flags(), "-o", str(linked)])
        linked.replace(target)  # atomic: a killed build leaves no half library under the final name


def _precompile(compiling: list[str], folder: Path) -> list[str]:
    """What makes a source read the shared headers as the compiler has understood them already.

    They take 6 s a source, of which this saves 5. The compiler finds what it made of them, 160 MB, under the header's
    name with .gch behind it. Nothing needs it: where it fails, each source reads the headers itself.
    """
    header, compiled = folder / SHARED, folder / f"{SHARED}.gch"
    try:
        shutil.copy(SOURCES / SHARED, header)
        _run([*compiling, "-x", "c++-header", str(header), "-o", str(compiled)])
    except (BuildFailed, OSError):
        compiled.unlink(missing_ok=True)
        return []
    return ["-include", str(header)]


def _clear_away(folder: Path) -> None:
    """Remove what builds left that were killed; one that goes on is younger."""
    for left in folder.glob("build-*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE:
                shutil.rmtree(left, ignore_errors=True)


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (our own arguments)
    if result.returncode:
        raise BuildFailed(f"{shlex.join(command[:1])} ended with {result.returncode}: {result.stderr.strip()[-2000:]}")


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    if sys.platform == "win32":
        raise BuildFailed("CPU kernels are built on Linux and macOS only")
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
