"""The checks of `polyrank doctor`; each returns what it found and, where something is wrong, how to mend it."""

import os
import shlex
import shutil
import socket
import tempfile
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from server.client import Client
from server.commands.terminal import size
from server.model.errors import ModelLoadError
from server.model.source import Source, SourceKind, resolve_source
from server.settings import Settings, flag, variable

CGROUP = Path("/sys/fs/cgroup")
MODEL_AND_RUNTIME = 1.5 * 1024**3  # bytes: the default model in float32 and what torch takes beside it


class State(StrEnum):
    """How bad a finding is; FAILED would stop a server, or something that was asked for does not work."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding; `mend` is empty when there is nothing to do."""

    name: str
    state: State
    found: str
    mend: str = ""


def torch() -> Check:
    """Torch and transformers as pinned, and what torch computes on."""
    try:
        found = {name: version(name) for name in ("torch", "transformers")}
    except PackageNotFoundError as error:
        return Check("torch", State.FAILED, f"{error.name} is not installed", "make serve installs all packages")
    words = ", ".join(f"{name} {number}" for name, number in found.items())
    wrong = [name for name, number in found.items() if not _pinned(name, number)]
    if wrong:
        mend = "pip install -c constraints.txt -e . brings the tested versions"
        return Check("torch", State.WARNING, f"{words}: not the tested {' and '.join(wrong)}", mend)
    import torch as library

    where = (
        library.cuda.get_device_name() if library.cuda.is_available() else f"CPU, {library.get_num_threads()} threads"
    )
    return Check("torch", State.OK, f"{words}, on {where}")


def _pinned(name: str, number: str) -> bool:
    """Whether the version is the one that our own package asks for."""
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in requires("polyrank") or ()]
    return all(item.specifier.contains(number, prereleases=True) for item in wanted if item.name == name)


def compiler() -> Check:
    """The C++ compiler that builds the CPU kernels once."""
    command = (shlex.split(os.environ.get("CXX", "c++")) or ["c++"])[0]
    if (found := shutil.which(command)) is None:
        mend = "apt-get install g++, or set CXX (without one adapters run in plain torch, many times slower)"
        return Check("compiler", State.WARNING, f"{command} is not there", mend)
    return Check("compiler", State.OK, found)


def memory(settings: Settings) -> Check:
    """Free memory against what the options ask for."""
    device = max(settings.device_memory, settings.kv_cache_memory + settings.adapter_memory)
    wanted = device + settings.host_adapter_memory + MODEL_AND_RUNTIME
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        free = min(float(available), _left_in_container())
    except (OSError, StopIteration):
        return Check("memory", State.OK, f"not known here; about {size(wanted)} are needed")
    if free < wanted:
        mend = "lower " + " or ".join(map(flag, ("device_memory", "kv_cache_memory", "host_adapter_memory")))
        return Check("memory", State.WARNING, f"{size(free)} free, about {size(wanted)} needed on a CPU", mend)
    return Check("memory", State.OK, f"{size(free)} free, about {size(wanted)} needed on a CPU")


def _left_in_container() -> float:
    """What the container's limit leaves; infinite without one."""
    try:
        most, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return float("inf") if most == "max" else int(most) - int(used)
    except (OSError, ValueError):
        return float("inf")


def model(settings: Settings) -> Check:
    """Whether the base model is on this machine."""
    try:
        source = resolve_source(settings.model)
    except ModelLoadError as error:
        return Check("model", State.FAILED, error.message, f"or name another model with {variable('model')}")
    if (wrong := _unreadable(source)) is not None:
        return Check("model", State.FAILED, f"{source.id}: {wrong}", f"name another model with {variable('model')}")
    if source.kind is not SourceKind.HUB:
        return Check("model", State.OK, f"{source.id}, on this machine")
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(source.location, "config.json"), str):
        return Check("model", State.OK, f"{source.id}, downloaded")
    return Check("model", State.WARNING, f"{source.id} is not on this machine", "the first start downloads it")


def _unreadable(source: Source) -> str | None:
    """What is wrong with the head of a GGUF file or with a folder's config; the weights are not read."""
    if source.kind in (SourceKind.GGUF, SourceKind.DEFAULT):
        with Path(source.location).open("rb") as file:
            return None if file.read(4) == b"GGUF" else "this is no GGUF file"
    if source.kind is SourceKind.FOLDER:
        from transformers import AutoConfig

        try:
            AutoConfig.from_pretrained(source.location, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            return " ".join(str(error).split())[:200]
    return None


def store(settings: Settings) -> Check:
    """Whether the folder or bucket of adapters can be written."""
    place = settings.store.removeprefix("file://")
    if place.startswith("memory:"):
        return Check("store", State.OK, f"{place}, gone when the server ends")
    if "://" in place:
        return _bucket(place)
    nearest = next(path for path in (Path(place).absolute(), *Path(place).absolute().parents) if path.exists())
    try:
        if not nearest.is_dir():
            raise NotADirectoryError(f"{nearest} is not a folder")
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        mend = f"set {variable('store')} to a folder of your own"
        return Check("store", State.FAILED, f"{place} cannot be written: {error.strerror or error}", mend)
    hint = "; `polyrank fsck` reads what is in it" if (Path(place) / "lock").exists() else ""
    return Check("store", State.OK, f"{place}, {size(shutil.disk_usage(nearest).free)} free{hint}")


def _bucket(place: str) -> Check:
    from adapters_store.errors import CodedError
    from adapters_store.log import open_store

    try:
        open_store(place)
    except CodedError as error:
        return Check("store", State.FAILED, error.message, f"or name another store with {variable('store')}")
    return Check("store", State.OK, f"{place} can be read and written")


def port(settings: Settings) -> Check:
    """Whether the port is free, or held by a Polyrank server."""
    where = f"{settings.host}:{settings.port}"
    if (problem := why_not_bind(settings)) is None:
        return Check("port", State.OK, f"{where} is free")
    with Client(settings.address) as client:
        if client.ready():
            return Check("port", State.OK, f"{where} is held by a running server")
    return Check("port", State.FAILED, f"{where}: {problem}", f"choose another with {variable('port')}")


def why_not_bind(settings: Settings) -> str | None:
    """The reason why the address cannot be listened on, or None."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            if os.name == "posix":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None
