"""What one line of the log says: version n of a name is this manifest, or the name is deleted."""

import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from adapters_store import canonical, proof
from adapters_store.info import AdapterInfo, BaseName, ModuleCount, Notice, Proof, RankRange

SCHEMA = 1
DELETED = "delete"
UNREADABLE = "unreadable"


_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Blob:
    """A file by its digest, which becomes part of paths: whoever wrote the record may not choose any other."""

    digest: str
    size: int

    def __post_init__(self) -> None:
        if _HEX.fullmatch(self.digest) is None or self.size < 0:  # TypeError for what is no text
            raise ValueError(f"no digest and size of a file: {self.digest!r}, {self.size!r}")


@dataclass(frozen=True, slots=True)
class Record:
    """A version of a name. It repeats the manifest's summary, so that a listing reads no manifest.

    manifest: digest, or None for a tombstone or an unreadable record; info: what `AdapterInfo` shows; generator: what
    else is told of a generator.
    """

    version: int
    event: str
    manifest: str | None
    info: AdapterInfo
    blobs: Mapping[str, Blob]
    generator: Mapping[str, Any] | None = None

    @property
    def deleted(self) -> bool:
        return self.event == DELETED


def encode(
    version: int, event: str, manifest: Mapping[str, Any] | None, digest: str | None, proved: Proof | None = None
) -> bytes:
    """A new record. `id` tells a retried write from another writer's; `check` guards against bit rot."""
    body = {
        "schema": SCHEMA,
        "version": version,
        "event": event,
        "manifest": digest,
        "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "id": uuid.uuid4().hex,
        "summary": _summary(manifest) if manifest else None,
        "blobs": manifest["blobs"] if manifest else {},
        "proof": proof.encode(proved),
    }
    return canonical.dump({**body, "check": canonical.digest(canonical.dump(body))})


_SUMMARY = (
    "kind",
    "base",
    "forms",
    "modules",
    "rank",
    "parameters",
    "bytes",
    "provenance",
    "compression",
    "warnings",
)
GENERATOR = "generator"  # in a generator's manifest
WHERE_ANY = ("knobs", "virtual_tokens", "invocation")  # manifests without them lack the key


def _summary(manifest: Mapping[str, Any]) -> dict[str, Any]:
    told = {key: manifest[key] for key in _SUMMARY}
    return told | {key: manifest[key] for key in (*WHERE_ANY, GENERATOR) if key in manifest}


def decode(name: str, version: int, data: bytes) -> Record:
    """The record, or one with event `unreadable` where its bytes are damaged: its name must still be listed."""
    try:
        fields = json.loads(data)
        check = fields.pop("check")
        if canonical.digest(canonical.dump(fields)) != check or fields["version"] != version:
            return unreadable(name, version)
        blobs = {key: Blob(value["digest"], value["size"]) for key, value in fields["blobs"].items()}
        info = _info(name, version, fields)
        generator = (fields["summary"] or {}).get(GENERATOR)
        return Record(version, fields["event"], fields["manifest"], info, blobs, generator)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return unreadable(name, version)


def unreadable(name: str, version: int) -> Record:
    notice = Notice("adapter_corrupt", "This version's record is damaged; upload the adapter again.")
    return Record(version, UNREADABLE, None, _empty(name, version, UNREADABLE, "", (notice,)), {})


def _info(name: str, version: int, fields: dict[str, Any]) -> AdapterInfo:
    event, created, told = fields["event"], fields["created"], fields["summary"]
    if told is None:
        return _empty(name, version, event, created, ())
    proved = proof.decode(fields.get("proof"))  # older records have none
    warnings = tuple(Notice(**notice) for notice in told["warnings"])
    return AdapterInfo(
        name=name,
        version=version,
        digest=fields["manifest"],
        kind=told["kind"],
        forms=tuple(told["forms"]),
        rank=RankRange(**told["rank"]),
        modules=ModuleCount(**told["modules"]),
        parameters=told["parameters"],
        bytes=told["bytes"],
        base=BaseName(**told["base"]),
        created=created,
        event=event,
        provenance=told["provenance"],
        compression=told["compression"],
        warnings=(*warnings, *proof.notices(proved, warnings)),
        proof=proved,
        knobs=told.get("knobs", {}),
        virtual_tokens=told.get("virtual_tokens", 0),
        invocation=tuple(told.get("invocation", ())),
    )


def _empty(name: str, version: int, event: str, created: str, warnings: tuple[Notice, ...]) -> AdapterInfo:
    return AdapterInfo(
        name=name,
        version=version,
        digest="",
        kind="deleted" if event == DELETED else event,
        forms=(),
        rank=RankRange(0, 0),
        modules=ModuleCount(0, 0),
        parameters=0,
        bytes=0,
        base=BaseName("", ""),
        created=created,
        event=event,
        provenance={},
        compression=None,
        warnings=warnings,
    )
