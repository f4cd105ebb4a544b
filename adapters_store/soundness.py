"""Which stored files were found damaged or missing, learnt whenever one is read."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace as with_changes
from pathlib import Path
from typing import Any

from adapters_store import canonical
from adapters_store.bucket import Source
from adapters_store.errors import AdapterCorrupt, AdapterNotFound, read_error
from adapters_store.info import AdapterInfo, Notice
from adapters_store.log import Log
from adapters_store.names import PUBLIC
from adapters_store.records import Blob, Record

DAMAGED = Notice("adapter_corrupt", "A stored file of this adapter is damaged or missing; upload it again.")


class Soundness:
    """Thread-safe; blocking but for `is_damaged` and `shown`. damaged: digests of manifests and blobs, which adapters
    may share."""

    def __init__(self, store: Log) -> None:
        self._log = store
        self.damaged: set[str] = set()

    def is_damaged(self, record: Record) -> bool:
        return not self.damaged.isdisjoint({record.manifest, *(blob.digest for blob in record.blobs.values())})

    def shown(self, record: Record, tenant: str) -> AdapterInfo:
        """What the API tells of a tenant's version."""
        info = record.info if tenant == PUBLIC else with_changes(record.info, tenant=tenant)
        return with_changes(info, warnings=(*info.warnings, DAMAGED)) if self.is_damaged(record) else info

    def check(self, record: Record) -> bool:
        """Whether manifest and files have their digests; every one is read."""
        if record.manifest is not None:
            with suppress(AdapterCorrupt, AdapterNotFound), self.watched(record.manifest):
                self._log.manifest(record.manifest)
        for blob in record.blobs.values():
            with suppress(AdapterCorrupt), self.blob(blob):
                pass
        return not self.is_damaged(record)

    def restore(self, record: Record, manifest: Mapping[str, Any], files: Mapping[str, Source]) -> bool:
        """Writes the files again. False if the manifest is still damaged: an older Polyrank may have worded it."""
        self._log.restore(manifest, files)
        return self.check(record)

    @contextmanager
    def blob(self, blob: Blob) -> Iterator[Path]:
        """As `Log.blob`."""
        with ExitStack() as stack:
            with self.watched(blob.digest):
                path = stack.enter_context(self._log.blob(blob))
            yield path

    def stream(self, blob: Blob) -> Iterator[bytes]:
        """The bytes of a file; the first piece, an empty one, comes when it is opened and verified."""
        return pieces(self.blob(blob))

    @contextmanager
    def watched(self, digest: str) -> Iterator[None]:
        """Remembers whether the file that is read here was found damaged or sound."""
        try:
            yield
        except (AdapterCorrupt, AdapterNotFound):
            self.damaged.add(digest)
            raise
        self.damaged.discard(digest)


def pieces(opened: AbstractContextManager[Path]) -> Iterator[bytes]:
    """The bytes of a file in blocks, after an empty one that comes when it is opened; it stays so until the last."""
    with opened as path:
        try:
            with path.open("rb") as file:
                yield b""
                while block := file.read(canonical.CHUNK):
                    yield block
        except OSError as error:
            raise read_error(error, "file") from error
