"""Adapters by name: the one door to the store for uploads, look-ups and loads."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from adapters_store import names, stored, variants
from adapters_store.bucket import Source
from adapters_store.candidate import NOT_RUNNING, Candidate, FormFiles, contents, made_files, manifest_of, of_forms
from adapters_store.catalogue import Catalogue, Committed
from adapters_store.errors import AdapterCorrupt, AdapterInvalid, StoreUnavailable, read_error
from adapters_store.formats import forms_file, importer, peft, peft_export
from adapters_store.forms import AdapterWeights, BaseSpec, MadeForms
from adapters_store.index import Index
from adapters_store.info import AdapterInfo, AdapterRef, Proof
from adapters_store.limits import Limits
from adapters_store.log import Log, lost
from adapters_store.lookup import Found, Lookup
from adapters_store.quota import QuotaOf, Quotas, Wanted, no_quota
from adapters_store.records import DELETED, Blob, Record
from adapters_store.soundness import DAMAGED, Soundness

_ATTEMPTS = 32  # lost races in a row before a writer gives up; each loss means that somebody else won
_UPLOAD: Mapping[str, Any] = {"type": "upload"}
_Infos = list[AdapterInfo]  # inside the class, `list` is the method


class AdapterRegistry:
    """Adapters of one base model, `base`, within `limits`.

    Thread-safe; blocking, except `resolve`, `info`, `list` and `versions`. catalogue: the names, which others may
    change; committed: is told of every version that is appended here; quota_of: what a tenant may keep.
    """

    def __init__(
        self,
        store: Log,
        base: BaseSpec,
        limits: Limits | None = None,
        committed: Committed | None = None,
        quota_of: QuotaOf = no_quota,
    ) -> None:
        self._log = store
        self.base = base
        self.limits = limits or Limits()
        self._files = stored.Loader(base, self.limits)
        self._index = Index()
        self._names = Lookup(self._index, base.names)
        self._quotas = Quotas(self._index, quota_of)
        self.catalogue = Catalogue(store, self._index, committed)
        self._soundness = Soundness(store)
        self.refresh()

    # --- look-ups, in memory

    def resolve(self, reference: str, tenant: str = "public") -> AdapterRef:
        """The immutable version that `name`, `name@3`, `sha256:<digest>` or `base:name` means now.

        Raises AdapterNotFound, also for another tenant's adapter, or AdapterCorrupt.
        """
        name, record, owner = self._names.find(reference, tenant)
        if record.manifest is None:
            raise AdapterCorrupt(DAMAGED.message)
        told = record.info
        acts = (told.knobs, told.virtual_tokens, told.invocation)
        return AdapterRef(name, record.version, record.manifest, owner, *acts)

    def info(self, reference: str, tenant: str = "public") -> AdapterInfo:
        return self._told(self._names.find(reference, tenant))

    def current(self, name: str, tenant: str) -> AdapterInfo | None:
        """What the tenant's own name holds, which `info` may have of the public one."""
        record = self._index.current(tenant, name)
        return self._soundness.shown(record, tenant) if record is not None else None

    def list(self, tenant: str = "public", cursor: str | None = None, limit: int = 100) -> tuple[_Infos, str | None]:
        """A page of current adapters by name, and the cursor of the next page or None. Damaged ones are listed."""
        found, following = self._names.page(tenant, cursor, limit)
        return [self._told(each) for each in found], following

    def versions(self, name: str, tenant: str = "public") -> _Infos:
        """Every version of a name, newest first, deletions included. Raises AdapterNotFound for an unused name."""
        return [self._told(each) for each in self._names.versions(name, tenant)]

    def held(self, digest: str) -> bool:
        """Whether it is the current content of any name, whosever."""
        return digest in self.catalogue.digests()

    def share_here(self, name: str, version: int, tenant: str = "public") -> float:
        """Share of a version's bytes on this machine's disk, 0 to 1; it grows while they are fetched from a bucket."""
        record = self._index.version(tenant, name, version)
        return self._log.share_here(record) if record is not None else 0.0

    # --- changes

    def add(
        self,
        name: str,
        config: bytes,
        weights_path: Path,
        *,
        tenant: str = "public",
        if_match: str | None = None,
        replace: bool = False,
        provenance: Mapping[str, Any] = _UPLOAD,
    ) -> tuple[AdapterInfo, bool]:
        """Checks and stores an adapter as the next version of a name, without a probe; (info, True), or (info, False)
        if the name holds this content already. Raises what `candidate` and `store` raise. All or nothing.
        """
        asked: dict[str, Any] = {"tenant": tenant, "if_match": if_match, "replace": replace}
        found = self.candidate(name, config, weights_path, **asked, provenance=provenance)
        return self.store(found, found.proof(NOT_RUNNING))

    def candidate(
        self,
        name: str,
        config: bytes,
        weights_path: Path,
        *,
        tenant: str = "public",
        if_match: str | None = None,
        replace: bool = False,
        provenance: Mapping[str, Any] = _UPLOAD,
    ) -> Candidate:
        """Checks an adapter that is to become the next version of a name; stores nothing.

        Raises AdapterInvalid, UnsupportedFormat, AdapterConflict (other content, and neither `if_match` nor
        `replace`), PreconditionFailed (`if_match` is not the current digest), StoreUnavailable. Errors in reading
        `weights_path` are the caller's: OSError.
        """
        names.check_name(name, *self.base.names)
        names.check_tenant(tenant)
        blobs, files = contents({peft.CONFIG_FILE: config, peft.WEIGHTS_FILE: weights_path})
        self.catalogue.refresh_name(tenant, name)
        known = self._check_free(tenant, name, blobs, if_match, replace) is not None
        imported = importer.inspect(config, weights_path, self.base, self.limits)
        told = {**imported.manifest_fields(), "provenance": dict(provenance)}
        made = (manifest_of(self.base, blobs[peft.WEIGHTS_FILE], blobs, told), files, blobs)
        self._quotas.check(tenant, [Wanted.of(name, made[0])])
        return Candidate(tenant, name, config, weights_path, *made, if_match, replace, imported.base, known)

    def store(self, found: Candidate, proof: Proof) -> tuple[AdapterInfo, bool]:
        """Stores a candidate. Raises AdapterConflict, PreconditionFailed, StorageFull or StoreUnavailable."""
        kept = (found.manifest, found.files, found.blobs, found.if_match, found.replace)
        return self._append(found.tenant, found.name, "upload", *kept, proof)

    def require_free(
        self, name: str, modules: forms_file.Modules | FormFiles, tenant: str, if_match: str | None, replace: bool
    ) -> bool:
        """Refuses what `add_forms` would refuse, before anything is measured; whether the name holds this now."""
        names.check_name(name, *self.base.names)
        self.catalogue.refresh_name(tenant, name)
        held = self._check_free(tenant, name, contents(made_files(modules))[0], if_match, replace)
        self.require_room(name, tenant)
        return held is not None

    def require_room(self, name: str, tenant: str) -> None:
        """Raises QuotaExceeded if the tenant may have no more adapters and this name would be one."""
        self._quotas.check(tenant, [Wanted(name, "", 0)])

    def add_forms(
        self,
        name: str,
        modules: forms_file.Modules | FormFiles,
        event: str,
        told: Mapping[str, Any],
        *,
        tenant: str = "public",
        if_match: str | None = None,
        replace: bool = False,
        proof: Proof | None = None,
    ) -> tuple[AdapterInfo, bool]:
        """Stores forms that the server has made as the next version of a name; otherwise as `add`.

        event: what made them; told: more fields of the manifest: kind, warnings, provenance, compression; proof: of one
        that was tried out.
        """
        names.check_name(name, *self.base.names)
        names.check_tenant(tenant)
        manifest, files, blobs = of_forms(self.base, modules, told)
        self.catalogue.refresh_name(tenant, name)
        return self._append(tenant, name, event, manifest, files, blobs, if_match, replace, proof)

    def add_collection(
        self, adapters: Sequence[MadeForms], event: str, tenant: str = "public"
    ) -> Sequence[tuple[AdapterInfo, bool]]:
        """`add_forms` of several names: all files are written and all conditions looked at before the first version is.

        A store that fails, or a writer that comes between, may yet leave the versions of the first names.
        """
        made = [of_forms(self.base, each.modules, each.told) for each in adapters]
        for each in adapters:
            self.catalogue.refresh_name(tenant, each.name)
            current = self._index.current(tenant, each.name)
            names.check_match(current.manifest if current else None, each.if_match)
        self._quotas.check(tenant, [Wanted.of(each.name, parts[0]) for each, parts in zip(adapters, made, strict=True)])
        for manifest, files, _ in made:
            self._log.restore(manifest, files)
        return [
            self._append(tenant, each.name, event, *parts, each.if_match, False)
            for each, parts in zip(adapters, made, strict=True)
        ]

    def delete(self, name: str, tenant: str = "public", if_match: str | None = None) -> None:
        """Appends a tombstone; the content stays loadable by digest.

        Raises NameExpected, AdapterNotFound, PreconditionFailed.
        """
        names.require_name(name)
        for _ in range(_ATTEMPTS):
            self.catalogue.refresh_name(tenant, name)
            current = self._index.current(tenant, name)
            if current is None:
                self._names.require_own(name, tenant)
                raise self._names.missing(name, name, None, tenant)
            names.check_match(current.manifest, if_match)
            if record := self._log.commit(tenant, name, self.catalogue.newest(tenant, name) + 1, DELETED):
                self._committed(tenant, name, record)
                return
        raise names.busy(name)

    def rollback(self, name: str, version: int, tenant: str = "public") -> AdapterInfo:
        """Appends a version with the content of an older one; of a deleted name, too. No change if it is current."""
        names.require_name(name)
        for _ in range(_ATTEMPTS):
            self.catalogue.refresh_name(tenant, name)
            wanted = self._index.version(tenant, name, version)
            if wanted is None or wanted.manifest is None:
                self._names.require_own(name, tenant)
                raise names.not_found(f"{name}@{version}")
            current = self._index.current(tenant, name)
            if current is not None and current.manifest == wanted.manifest:
                return self._soundness.shown(current, tenant)
            manifest = self._log.manifest(wanted.manifest)
            number, proof = self.catalogue.newest(tenant, name) + 1, wanted.info.proof
            with self._quotas.room(tenant, Wanted(name, wanted.manifest, wanted.info.bytes)):
                if record := self._log.commit(tenant, name, number, "rollback", manifest, proof=proof):
                    return self._committed(tenant, name, record)
        raise names.busy(name)

    # --- content

    def load(self, key: str) -> AdapterWeights:
        """The forms of an adapter by digest, or of a variant by `variants.key_of`, its files verified.

        Raises AdapterCorrupt, AdapterNotFound, AdapterInvalid, KnobRefused, StoreUnavailable.
        """
        digest, variant = variants.split(key)
        with self._soundness.watched(digest):
            manifest = self._log.manifest(digest)
        if manifest["base"]["fingerprint"] != self.base.fingerprint:
            raise AdapterInvalid(
                f"The adapter belongs to `{manifest['base']['id']}`, not to the served base.", code="base_mismatch"
            )
        blobs = {name: Blob(**blob) for name, blob in manifest["blobs"].items()}
        with ExitStack() as stack:
            paths = {name: stack.enter_context(self._soundness.blob(blob)) for name, blob in blobs.items()}
            try:
                return self._files.load(paths, key, variant)
            except OSError as error:
                raise read_error(error, "file") from error

    def weights(self, found: Candidate) -> AdapterWeights:
        """The forms of a candidate, under no digest. Raises AdapterInvalid, OSError."""
        return self._files.upload(found.config, found.weights)

    def open_file(self, reference: str, filename: str, tenant: str = "public") -> tuple[int, Iterator[bytes]]:
        """Size and bytes of a file, verified before the first block; closing the iterator releases it.

        Adapters that the server has made are written as PEFT's two files, too.
        """
        record = self._names.find(reference, tenant).record
        blob = record.blobs.get(filename)
        if stored.exported(record.blobs, filename) and record.manifest is not None:
            return peft_export.export(filename, self.load(record.manifest).modules, self.base)
        if blob is None:
            raise names.no_file(filename, record.blobs)
        stream = self._soundness.stream(blob)
        next(stream)  # opens and verifies now, so that a damaged file is an error and not a cut answer
        return blob.size, stream

    # --- upkeep

    def refresh(self) -> None:
        """Reads the whole log again; names whose manifest or blobs are missing or short are marked damaged."""
        for item in self._log.records():
            self._index.put(item.tenant, item.name, item.record)
        sizes = self._log.sizes()
        self._soundness.damaged = {digest for record in self._index.all_current() for digest in lost(record, sizes)}

    def verify(self, stop: Callable[[], bool] = lambda: False) -> frozenset[str]:
        """Hashes every file of every current adapter, for a background thread; the digests of damaged adapters."""
        records = {record.manifest: record for record in self._index.all_current()}
        for record in records.values():
            if stop():
                break
            with suppress(StoreUnavailable):  # that says nothing of the adapter
                self._soundness.check(record)
        return frozenset(digest for digest, record in records.items() if digest and self._soundness.is_damaged(record))

    def _check_free(
        self, tenant: str, name: str, blobs: Mapping[str, Blob], if_match: str | None, replace: bool
    ) -> Record | None:
        """The current record if it holds this very content, None if a new version may be written."""
        current = self._index.current(tenant, name)
        if current is not None and current.blobs == blobs and current.info.base.fingerprint == self.base.fingerprint:
            return current
        if if_match is not None:
            names.check_match(current.manifest if current else None, if_match)
        elif current is not None and not replace:
            raise names.taken(name, current.version, current.manifest)
        return None

    def _append(
        self,
        tenant: str,
        name: str,
        event: str,
        manifest: Mapping[str, Any],
        files: Mapping[str, Source],
        blobs: Mapping[str, Blob],
        if_match: str | None,
        replace: bool,
        proof: Proof | None = None,
    ) -> tuple[AdapterInfo, bool]:
        with self._quotas.room(tenant, Wanted.of(name, manifest)):
            for _ in range(_ATTEMPTS):
                current = self._check_free(tenant, name, blobs, if_match, replace)
                if current and (self._soundness.check(current) or self._soundness.restore(current, manifest, files)):
                    return self._soundness.shown(current, tenant), False
                number = self.catalogue.newest(tenant, name) + 1
                if record := self._log.commit(tenant, name, number, event, manifest, files, proof):
                    self._soundness.damaged.difference_update(files)
                    return self._committed(tenant, name, record), True
                self.catalogue.refresh_name(tenant, name)
        raise names.busy(name)

    def _committed(self, tenant: str, name: str, record: Record) -> AdapterInfo:
        self.catalogue.appended(tenant, name, record)
        self._soundness.damaged.discard(record.manifest or "")
        return self._soundness.shown(record, tenant)

    def _told(self, found: Found) -> AdapterInfo:
        return self._soundness.shown(found.record, found.tenant)
