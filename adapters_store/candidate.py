"""An upload that was checked and is not stored yet."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters_store import canonical
from adapters_store.bucket import Source
from adapters_store.formats import forms_file
from adapters_store.forms import BaseSpec
from adapters_store.info import BaseCheck, ModuleCount, Notice, Probe, Proof
from adapters_store.records import Blob

# No server ran yet: `--preload` at start, or the store used as a library.
NOT_RUNNING = Notice("not_running", "Added before the engine ran, so nothing was computed with it.")


@dataclass(frozen=True, slots=True)
class Candidate:
    """What `AdapterRegistry.candidate` has found sound, for `AdapterRegistry.store`.

    config, weights: the two files, which must stay as they are until then; files: the same as blob digest -> content;
    if_match, replace: as for `AdapterRegistry.add`; known: the name holds this very content already.
    """

    tenant: str
    name: str
    config: bytes
    weights: Path
    manifest: Mapping[str, Any]
    files: Mapping[str, Source]
    blobs: Mapping[str, Blob]
    if_match: str | None
    replace: bool
    base: BaseCheck
    known: bool

    def proof(self, found: Probe | Notice) -> Proof:
        """The report on this upload, with a probe or the reason why there is none."""
        modules = ModuleCount(**self.manifest["modules"])
        if isinstance(found, Probe):
            return Proof(modules, self.base, probe=found)
        return Proof(modules, self.base, reason=found)


@dataclass(frozen=True, slots=True)
class FormFiles:
    """Forms that another process has written. paths: `forms_file.FORMS_FILE` to a file; facts: `forms_file.facts`;
    matched: how many modules."""

    paths: Mapping[str, Path]
    facts: Mapping[str, Any]
    matched: int


def contents(files: Mapping[str, Source]) -> tuple[dict[str, Blob], dict[str, Source]]:
    """Files by name as blobs by name, and as contents by digest. Raises OSError."""
    blobs = {name: _blob(source) for name, source in files.items()}
    return blobs, {blobs[name].digest: source for name, source in files.items()}


def _blob(source: Source) -> Blob:
    if isinstance(source, bytes):
        return Blob(canonical.digest(source), len(source))
    return Blob(canonical.digest_file(source), source.stat().st_size)


def manifest_of(base: BaseSpec, weights: Blob, blobs: Mapping[str, Blob], fields: Mapping[str, Any]) -> dict[str, Any]:
    """What an adapter of this base is. weights: the file whose size is the adapter's; fields: what else is told."""
    return {
        "schema": 1,
        "base": {"id": base.id, "fingerprint": base.fingerprint},
        "bytes": weights.size,
        "blobs": {name: {"digest": blob.digest, "size": blob.size} for name, blob in blobs.items()},
        "compression": None,
        **fields,
    }


def of_forms(
    base: BaseSpec, modules: forms_file.Modules | FormFiles, told: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Source], dict[str, Blob]]:
    """Manifest, contents by digest, and blobs by name, of forms that the server has made."""
    if isinstance(modules, FormFiles):
        (blobs, files), facts, matched = contents(modules.paths), modules.facts, modules.matched
    else:
        (blobs, files), facts = contents(forms_file.dump(modules)), forms_file.facts(modules)
        matched = len(modules)
    fields = {**facts, "modules": {"matched": matched, "total": len(base.modules)}, **told}
    return manifest_of(base, blobs[forms_file.FORMS_FILE], blobs, fields), files, blobs
