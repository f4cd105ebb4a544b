"""Reads a whole store and says what is wrong with it. Changes nothing."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from adapters_store.errors import AdapterCorrupt, AdapterNotFound
from adapters_store.log import ADAPTERS, Located, Log, blob_key, manifest_key
from adapters_store.records import UNREADABLE, Blob

Progress = Callable[[int, int | None], None]  # bytes read, bytes in all


@dataclass(frozen=True, slots=True)
class Problem:
    """code: `record_damaged`, `version_gap`, `manifest_missing`, `manifest_damaged`, `manifest_differs`,
    `blob_missing` or `blob_damaged`; where: `tenant/name@version`, of the first version that shows it; before a
    generator's stands `generators/`.
    """

    code: str
    where: str
    message: str


@dataclass(slots=True)
class Report:
    """versions: records read; files: blobs and manifests that they name; bytes: those of the files; unreferenced:
    files that no record names, which is no damage: `gc` removes them.
    """

    versions: int = 0
    files: int = 0
    bytes: int = 0
    unreferenced: int = 0
    problems: list[Problem] = field(default_factory=list)


def check(log: Log, progress: Progress = lambda done, total: None) -> Report:
    """Every version has its files, each of the right size and digest, and no version lacks its predecessor.

    Raises StoreUnavailable if the store cannot be read.
    """
    sizes = log.sizes()
    located = log.all_records()
    report = Report(versions=len(located))
    _check_versions(located, report)
    manifests = {item.record.manifest: item for item in reversed(located) if item.record.manifest is not None}
    blobs = {blob: item for item in reversed(located) for blob in item.record.blobs.values()}
    for digest, item in manifests.items():
        _check_manifest(log, digest, item, sizes, report)
    total = report.bytes + sum(blob.size for blob in blobs)
    for blob, item in blobs.items():
        _check_blob(log, blob, item, sizes, report)
        report.bytes += blob.size
        progress(report.bytes, total)
    named = {blob_key(blob.digest) for blob in blobs} | {manifest_key(digest) for digest in manifests}
    report.files = len(named)
    report.unreferenced = len(sizes.keys() - named)
    return report


def _check_versions(located: list[Located], report: Report) -> None:
    names: dict[tuple[str, str, str], list[Located]] = defaultdict(list)
    for item in located:
        names[item.space, item.tenant, item.name].append(item)
        if item.record.event == UNREADABLE:
            _tell(report, "record_damaged", item, "the record cannot be read; upload the adapter again")
    for items in names.values():
        found = {item.record.version for item in items}
        missing = sorted(set(range(1, max(found))) - found)
        if missing:
            text = f"version {missing[0]} is missing" + (f", and {len(missing) - 1} more" if missing[1:] else "")
            _tell(report, "version_gap", max(items, key=lambda item: item.record.version), text)


def _check_manifest(log: Log, digest: str, item: Located, sizes: dict[str, int], report: Report) -> None:
    try:
        manifest = log.manifest(digest)
    except AdapterNotFound:
        _tell(report, "manifest_missing", item, f"there is no manifest {digest}")
    except AdapterCorrupt:
        _tell(report, "manifest_damaged", item, f"manifest {digest} has another digest")
    else:
        if {name: Blob(**blob) for name, blob in manifest["blobs"].items()} != item.record.blobs:
            _tell(report, "manifest_differs", item, f"manifest {digest} names other files than the record")
    report.bytes += sizes.get(manifest_key(digest), 0)


def _check_blob(log: Log, blob: Blob, item: Located, sizes: dict[str, int], report: Report) -> None:
    found = sizes.get(blob_key(blob.digest))
    try:
        with log.blob(blob):
            return
    except AdapterCorrupt:
        if found is None:
            _tell(report, "blob_missing", item, f"there is no file {blob.digest}")
        else:
            _tell(report, "blob_damaged", item, f"file {blob.digest} ({found} of {blob.size} bytes) has another digest")


def _tell(report: Report, code: str, item: Located, message: str) -> None:
    space = "" if item.space == ADAPTERS else f"{item.space}/"
    report.problems.append(Problem(code, f"{space}{item.tenant}/{item.name}@{item.record.version}", message))
