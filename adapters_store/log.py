"""The append-only log: content-addressed blobs and manifests, and one record per version of a name.

    blobs/sha256/<digest>                 a file as it was uploaded
    manifests/sha256/<digest>.json        what an adapter is; its digest is the adapter's
    names/<tenant>/<name>/<version>.json  version n of an adapter's name; created only if absent, which commits it
    generators/<tenant>/...               the same for generators, whose names are no adapters'
    jobs/<id>.json                        work that is not finished yet (`Notes`)
    store.json                            in a bucket only: proof that nothing there is created twice

Nothing is ever changed in place. Whatever is read is checked against its digest.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from adapters_store import canonical, places, records
from adapters_store.bucket import ObjectDamaged, ObjectMissing, Source, Stored
from adapters_store.cache import CachePlace
from adapters_store.errors import AdapterCorrupt, AdapterNotFound, StorageFull, damaged, read_error
from adapters_store.histogram import Distribution
from adapters_store.info import Proof
from adapters_store.notes import Notes
from adapters_store.objects import Objects
from adapters_store.records import Blob, Record

READERS = 32  # parallel reads while the index is built; each waits for the network on a remote store
ADAPTERS, GENERATORS = "names", "generators"  # spaces of names
_KEY = re.compile(r"(?P<space>names|generators)/(?P<tenant>[^/]+)/(?P<name>[^/]+)/(?P<version>[1-9][0-9]{0,9})\.json")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Located:
    """A record and where it stands."""

    tenant: str
    name: str
    record: Record
    space: str = ADAPTERS


class Log:
    """Thread-safe; several processes may share one store. space: whose names are read and written."""

    def __init__(self, objects: Objects, space: str = ADAPTERS) -> None:
        self._objects = objects
        self._space = space

    def of(self, space: str) -> "Log":
        """The log of another space over the same files."""
        return Log(self._objects, space)

    @property
    def staging(self) -> Path:
        """Folder for uploads in flight; leftovers of dead processes are swept when the store is opened."""
        return self._objects.staging

    @property
    def notes(self) -> Notes:
        """Small objects beside the log."""
        return Notes(self._objects)

    def commit(
        self,
        tenant: str,
        name: str,
        version: int,
        event: str,
        manifest: Mapping[str, Any] | None = None,
        files: Mapping[str, Source] | None = None,
        proof: Proof | None = None,
    ) -> Record | None:
        """Appends version `version` of a name: its blobs, its manifest, then its record.

        files: blob digest -> content; proof: of an upload. Without manifest: a tombstone. Returns None if the version
        exists already.
        Raises StorageFull or StoreUnavailable, with nothing changed.
        """
        data = canonical.dump(manifest) if manifest is not None else None
        digest = canonical.digest(data) if data is not None else None
        objects = {blob_key(key): source for key, source in (files or {}).items()}
        if data is not None and digest is not None:
            objects[manifest_key(digest)] = data
        line = records.encode(version, event, manifest, digest, proof)
        if not self._objects.publish(objects, (f"{self._space}/{tenant}/{name}/{version}.json", line)):
            return None
        return records.decode(name, version, line)

    def restore(self, manifest: Mapping[str, Any], files: Mapping[str, Source]) -> None:
        """Writes blobs and manifest of a known adapter again, in place of damaged ones."""
        data = canonical.dump(manifest)
        objects = {blob_key(key): source for key, source in files.items()}
        self._objects.publish({**objects, manifest_key(canonical.digest(data)): data})

    def records(self, known: Callable[[str, str], int] = lambda tenant, name: 0) -> list[Located]:
        """Every record of the space, each name's in order: one listing, then the records in parallel.

        known: the version of a tenant's name up to which records are left out.
        """
        keys = [key for key in self._objects.sizes(f"{self._space}/") if _above(key, known)]
        shares = [keys[start::READERS] for start in range(READERS)]  # a task for each of 10,000 keys cost 0.4 s
        with ThreadPoolExecutor(READERS) as pool:
            found = pool.map(lambda share: [self._locate(key) for key in share], shares)
            return sorted((item for items in found for item in items if item), key=lambda item: item.record.version)

    def all_records(self) -> list[Located]:
        """Every record of every space: whatever a file may belong to."""
        return [item for space in (ADAPTERS, GENERATORS) for item in self.of(space).records()]

    def records_of(self, tenant: str, name: str, after: int = 0) -> list[Record]:
        """The versions of one name above `after`, in order."""
        prefix = f"{self._space}/{tenant}/{name}/"
        versions = {int(found["version"]): key for key in self._objects.sizes(prefix) if (found := _KEY.fullmatch(key))}
        located = (self._locate(versions[version]) for version in sorted(versions) if version > after)
        return [item.record for item in located if item]

    def manifest(self, digest: str) -> dict[str, Any]:
        """The manifest, checked. Raises AdapterNotFound, AdapterCorrupt or StoreUnavailable."""
        if not _DIGEST.fullmatch(digest):
            raise AdapterNotFound("A digest is 64 hexadecimal characters.", param="model")
        try:
            with self._objects.content(manifest_key(digest), digest) as path:
                manifest: dict[str, Any] = json.loads(path.read_bytes())
        except ObjectMissing:
            raise AdapterNotFound(f"The adapter `sha256:{digest}` does not exist.", param="model") from None
        except ObjectDamaged:
            raise damaged("manifest") from None
        except OSError as error:
            raise read_error(error, "manifest") from error
        return manifest

    @contextmanager
    def blob(self, blob: Blob) -> Iterator[Path]:
        """A blob as a local file, its digest checked before the context begins.

        Raises AdapterCorrupt or StoreUnavailable; errors of the context's user pass as they are.
        """
        with ExitStack() as stack:
            try:
                path = stack.enter_context(self._objects.content(blob_key(blob.digest), blob.digest, blob.size))
            except (ObjectMissing, ObjectDamaged):
                raise damaged("file") from None
            except OSError as error:
                raise read_error(error, "file") from error
            yield path

    def fetch_seconds(self) -> Distribution:
        """Times of downloads from a bucket since the start; none for a folder."""
        return self._objects.fetch_seconds.now()

    def share_here(self, record: Record) -> float:
        """Share of a version's bytes on this machine's disk, 0 to 1: nothing is read and no other machine asked."""
        blobs = record.blobs.values()
        here = sum(self._objects.bytes_here(blob_key(blob.digest), blob.digest, blob.size) for blob in blobs)
        return here / max(1, sum(blob.size for blob in blobs))

    def sizes(self) -> dict[str, int]:
        """Sizes of all blobs and manifests by key: two listings."""
        return {**self._objects.sizes("blobs/"), **self._objects.sizes("manifests/")}

    def empty(self) -> bool:
        """Whether there is no record and no file: a store that was never written to, or no store at all."""
        return not any(self._objects.sizes(prefix) for prefix in ("names/", "generators/", "blobs/", "manifests/"))

    def unreferenced(self, before: datetime) -> dict[str, Stored]:
        """The blobs and manifests that no version of any name has, and that were written before this time.

        It must be so long ago that whoever wrote them would have committed since. Raises AdapterCorrupt if a
        record cannot be read, for it may name any of them; StoreUnavailable.
        """
        # The records come second: what is committed between the two listings is then seen as referenced.
        found = {**self._objects.listing("blobs/"), **self._objects.listing("manifests/")}
        for record in (item.record for item in self.all_records()):
            if record.event == records.UNREADABLE:
                raise AdapterCorrupt("A record cannot be read, so what it names is not known; see `polyrank fsck`.")
            if record.manifest is not None:
                found.pop(manifest_key(record.manifest), None)
            for blob in record.blobs.values():
                found.pop(blob_key(blob.digest), None)
        return {key: item for key, item in found.items() if item.modified < before}

    def discard(self, key: str, seen: Stored) -> bool:
        """Removes one of `unreferenced`; False if it was written again meanwhile, for a record that is to come."""
        return self._objects.discard(key, seen)

    def _locate(self, key: str) -> Located | None:
        found = _KEY.fullmatch(key)
        if found is None:
            return None  # not ours
        name, version = found["name"], int(found["version"])
        try:
            record = records.decode(name, version, self._objects.get(key))
        except ObjectMissing:
            return None  # taken back by its writer between listing and reading
        except OSError as error:
            failure = read_error(error, "record")
            if not isinstance(failure, AdapterCorrupt):
                raise failure from error
            record = records.unreadable(name, version)
        return Located(found["tenant"], name, record, found["space"])


def _above(key: str, known: Callable[[str, str], int]) -> bool:
    found = _KEY.fullmatch(key)
    return found is not None and int(found["version"]) > known(found["tenant"], found["name"])


def open_store(url: str, cache: CachePlace | None = None, *, writing: bool = True) -> Log:
    """The store at a URL or in a folder; leftovers of interrupted writers are swept, a bucket is tried out.

    cache: where files of a bucket are kept on this machine; a folder or memory needs none. writing: false for upkeep,
    which must not leave the proof of a trial where there is no store.

    Raises StorageFull or StoreUnavailable, which say what to do.
    """
    try:
        objects = places.open_objects(url, cache)
        objects.sweep()
    except (OSError, ValueError) as error:
        raise StorageFull(f"The adapter store `{canonical.shorten(url)}` cannot be opened for writing.") from error
    if writing and places.is_remote(url):
        places.prove(objects, url)
    return Log(objects)


def lost(record: Record, sizes: Mapping[str, int]) -> set[str]:
    """The digests of those of the record's files, its manifest included, that are missing or not in full size."""
    found = {blob.digest for blob in record.blobs.values() if sizes.get(blob_key(blob.digest)) != blob.size}
    if record.manifest is not None and manifest_key(record.manifest) not in sizes:
        found.add(record.manifest)
    return found


def blob_key(digest: str) -> str:
    return f"blobs/sha256/{digest}"


def manifest_key(digest: str) -> str:
    return f"manifests/sha256/{digest}.json"
