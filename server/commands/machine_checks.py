"""Checks of `polyrank doctor` of the machine itself: Python, packages, caches, cores, GPU."""

import os
import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

from server.commands.checks import CGROUP, Check, State
from server.commands.terminal import size
from server.settings import Settings, flag

OLDEST = (3, 11)


def python() -> Check:
    """Python's version."""
    found = ".".join(str(part) for part in sys.version_info[:3])
    if sys.version_info[:2] < OLDEST:
        return Check(
            "python", State.FAILED, f"{found} is too old", "install 3.11 or newer: make serve PYTHON=python3.11"
        )
    return Check("python", State.OK, found)


def packages() -> Check:
    """Every package that ours asks for, in the version that was tested."""
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in requires("polyrank") or ()]
    wanted = [item for item in wanted if item.marker is None or item.marker.evaluate({"extra": ""})]
    missing, other = [], []
    for item in wanted:
        try:
            found = version(item.name)
        except PackageNotFoundError:
            missing.append(item.name)
            continue
        if not item.specifier.contains(found, prereleases=True):
            other.append(f"{item.name} {found} instead of {item.specifier}")
    mend = "pip install -c constraints.txt -e . brings the tested versions"
    if missing:
        return Check("packages", State.FAILED, f"not installed: {', '.join(missing)}", mend)
    if other:
        return Check("packages", State.WARNING, f"not as tested: {', '.join(other)}", mend)
    return Check("packages", State.OK, f"all {len(wanted)} as tested")


def caches() -> Check:
    """The folder where kernels are built and the default model is unpacked."""
    from server.model.default_model import cache_root

    root = cache_root()
    nearest = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        found = f"{root} cannot be written: {error.strerror or error}"
        return Check("caches", State.FAILED, found, "set POLYRANK_CACHE to a folder of your own")
    built = "kernels are built" if any(root.rglob("*.so")) else "the first start builds the kernels there"
    return Check("caches", State.OK, f"{root}, {size(shutil.disk_usage(nearest).free)} free; {built}")


def cores() -> Check:
    """Cores that may be used, against the threads that OpenMP will start and what else runs."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    allowed = min(mine, _quota() or mine)
    load, named = os.getloadavg()[0], os.environ.get("OMP_NUM_THREADS", "")
    threads = int(named) if named.isdecimal() and int(named) > 0 else mine
    found = f"{allowed} to use, {threads} threads, load {load:.1f}"
    if threads > allowed:
        mend = f"set OMP_NUM_THREADS={allowed}: threads that wait for each other's cores slow every step"
        return Check("cores", State.WARNING, f"{found}: more threads than cores", mend)
    if threads < allowed:
        return Check(
            "cores", State.WARNING, f"{found}: cores are left idle", f"unset OMP_NUM_THREADS, or set it to {allowed}"
        )
    if load > allowed:
        mend = "end or move those (see `top`), or start the server with OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0"
        return Check("cores", State.WARNING, f"{found}: other programs keep them busy", mend)
    return Check("cores", State.OK, found)


def _quota() -> int | None:
    """Cores that the container may use in the mean; None without a limit."""
    try:
        most, period = (CGROUP / "cpu.max").read_text().split()
        return None if most == "max" else max(1, int(most) // int(period))
    except (OSError, ValueError):
        return None


def gpu(settings: Settings) -> Check:
    """The device that the settings ask for, and what its kernels need."""
    import torch

    if torch.cuda.is_available() and settings.device != "cpu":
        name = torch.cuda.get_device_name()
        if find_spec("triton") is None:
            return Check("gpu", State.FAILED, f"{name}, but triton is not installed", "pip install 'polyrank[gpu]'")
        return Check("gpu", State.OK, f"{name}, CUDA {torch.version.cuda}")
    if settings.device == "cuda":
        mend = f"see nvidia-smi, install a CUDA build of torch, or say {flag('device')} cpu"
        return Check("gpu", State.FAILED, f"{flag('device')} cuda, but torch finds no GPU", mend)
    if settings.device == "auto" and shutil.which("nvidia-smi"):
        mend = "install a CUDA build of torch, and see whether nvidia-smi answers"
        return Check("gpu", State.WARNING, "there may be one, but torch finds none: the CPU is used", mend)
    return Check("gpu", State.OK, "none is used")
