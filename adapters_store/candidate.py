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
    """Forms in files. paths: the files by name; facts: as `forms_file.facts`; matched: how many modules; weights: the
    file whose size is the adapter's."""

    paths: Mapping[str, Source]
    facts: Mapping[str, Any]
    matched: int
    weights: str = forms_file.FORMS_FILE


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


def made_files(modules: forms_file.Modules | FormFiles) -> Mapping[str, Source]:
    """The files of forms that the server has made."""
    return modules.paths if isinstance(modules, FormFiles) else forms_file.dump(modules)


def of_forms(
    base: BaseSpec, modules: forms_file.Modules | FormFiles, told: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Source], dict[str, Blob]]:
    """Manifest, contents by digest, and blobs by name, of forms that the server has made."""
    if not isinstance(modules, FormFiles):
        modules = FormFiles(forms_file.dump(modules), forms_file.facts(modules), len(modules))
    blobs, files = contents(modules.paths)
    fields = {**modules.facts, "modules": {"matched": modules.matched, "total": len(base.modules)}, **told}
    return manifest_of(base, blobs[modules.weights], blobs, fields), files, blobs
