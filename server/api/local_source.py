"""Adapters from a folder on the server, below the one root that the operator allowed."""

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from adapters_store.errors import AdapterNotFound
from server.api.errors import SourceNotAllowed, UploadRefused
from server.api.services import ApiSettings
from server.api.uploads import Upload, staged_weights
from server.errors import PayloadTooLarge

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@contextmanager
def local_adapter(path: str, settings: ApiSettings) -> Iterator[Upload]:
    """The folder's two files, copied to staging so that nobody changes them while they are judged. Blocking."""
    folder = _below_root(path, settings.adapter_root)
    with staged_weights(settings) as weights:
        with _open(folder, CONFIG, settings) as file:
            config = file.read(settings.max_config_bytes + 1)
        if len(config) > settings.max_config_bytes:
            text = f"{CONFIG} is larger than {settings.max_config_bytes} bytes."
            raise UploadRefused(text, code="bad_config", param="lora_path")
        with _open(folder, WEIGHTS, settings) as source, weights.open("wb") as target:
            _check_size(source, settings.max_upload_bytes)
            shutil.copyfileobj(source, target, 1 << 20)
        yield Upload(config, weights)


def _below_root(path: str, root: Path | None) -> Path:
    """The folder with every symbolic link resolved. All that lies outside gets the same answer, there or not."""
    if root is None:
        text = "This server reads no adapters from its own disk: upload them, or start it with --adapter-root."
        raise SourceNotAllowed(text, param="lora_path")
    outside = SourceNotAllowed("lora_path must be a folder below the server's adapter root.", param="lora_path")
    if "\0" in path or "://" in path:
        raise outside
    try:
        real_root = root.resolve(strict=True)
        folder = (real_root / path).resolve()
    except (OSError, RuntimeError):
        raise outside from None
    if not folder.is_relative_to(real_root):
        raise outside
    return folder


def _open(folder: Path, name: str, settings: ApiSettings) -> BinaryIO:
    """A regular file of the folder; a link may lead elsewhere below the root, not out of it."""
    missing = AdapterNotFound(f"There is no {name} in that folder.", code="source_failed", param="lora_path")
    file = _below_root(str(folder / name), settings.adapter_root)
    try:
        # Links were resolved above: one that appears since then is refused. A pipe must not block the open.
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        raise missing from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise missing
    return cast(BinaryIO, os.fdopen(descriptor, "rb"))


def _check_size(file: BinaryIO, limit: int) -> None:
    if os.fstat(file.fileno()).st_size > limit:
        raise PayloadTooLarge(f"{WEIGHTS} is larger than {limit} bytes.", param="lora_path")
