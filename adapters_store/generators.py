"""Generators by name: versions in the log and files by digest, as adapters have, under names of their own."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from adapters_store import names
from adapters_store.candidate import contents, manifest_of
from adapters_store.canonical import shorten
from adapters_store.catalogue import Catalogue
from adapters_store.errors import AdapterCorrupt, AdapterNotFound, read_error
from adapters_store.forms import BaseSpec
from adapters_store.generation import generator_file, recipe
from adapters_store.generation.generator import Generator
from adapters_store.generation.generator_file import GENERATOR_FILE
from adapters_store.generation.layout import Layout
from adapters_store.generation.statistics import Statistics
from adapters_store.index import Index
from adapters_store.info import BaseName, Notice
from adapters_store.limits import Limits
from adapters_store.log import GENERATORS, Log
from adapters_store.quota import QuotaOf, Quotas, Wanted, no_quota
from adapters_store.records import DELETED, Blob, Record
from adapters_store.soundness import pieces

KIND = "icm_lora"
PUBLIC = "public"  # the tenant whose generators everybody may use
MAX_LOSSES = 64  # points of a loss curve that are kept
# Of a record that cannot be read.
_NOTHING: Mapping[str, Any] = {"layout": {}, "tasks": (), "condition": 0, "latent": 0, "losses": (), "sizes": {}}
_ATTEMPTS = 32  # lost races in a row before a writer gives up
_Infos = list["GeneratorInfo"]  # inside the class, `list` is the method


@dataclass(frozen=True, slots=True)
class GeneratorInfo:
    """One version of a generator.

    digest: SHA-256 of its file, which recipes name; layout: of the adapters it makes: `modules` (how many), `targets`
    (the last parts of their names), `rank`, `numbers` of an adapter, `dtype`; condition, latent: lengths of these
    vectors; parameters: of the model; losses: of training, at most `MAX_LOSSES` epochs; sizes: see
    `adapters_store.generation.recipe.Sizes`.
    """

    name: str
    version: int
    digest: str
    base: BaseName
    layout: Mapping[str, Any]
    tasks: Sequence[str]
    condition: int
    latent: int
    parameters: int
    bytes: int
    created: str
    event: str
    provenance: Mapping[str, Any]
    losses: Sequence[Mapping[str, float]]
    sizes: Mapping[str, int | None]
    warnings: Sequence[Notice] = ()


class Generators:
    """Generators of one base model, `base`. Thread-safe; blocking: every look-up asks the store which version is
    current, for others may write there too. A tenant finds its own, then the public ones, and changes its own alone.

    quota_of: what a tenant may keep: as many generators as adapters, and as many bytes of them, beside its adapters.
    """

    def __init__(self, store: Log, base: BaseSpec, limits: Limits | None = None, quota_of: QuotaOf = no_quota) -> None:
        self._log = store.of(GENERATORS)
        self._base = base
        self._limits = limits or Limits()
        self._index = Index()
        self._catalogue = Catalogue(self._log, self._index)
        self._quotas = Quotas(self._index, quota_of, "generators")

    def info(self, reference: str, tenant: str = "public") -> GeneratorInfo:
        """What `name`, `name@3` or `sha256:<digest>` means now. Raises AdapterNotFound, StoreUnavailable."""
        name, record = self._find(reference, tenant)
        return _info(name, record)

    def list(self, tenant: str = "public", cursor: str | None = None, limit: int = 100) -> tuple[_Infos, str | None]:
        """A page of current generators by name, and the cursor of the next page or None. Damaged ones are listed."""
        self._catalogue.catch_up()
        owners = _owners(tenant)
        found = sorted({name for owner in owners for name in self._index.names(owner, cursor or "", limit + 1)})
        current = [(name, [self._index.current(owner, name) for owner in owners]) for name in found[:limit]]
        infos = [_info(name, next(record for record in records if record)) for name, records in current if any(records)]
        return infos, found[limit - 1] if len(found) > limit else None

    def require_free(
        self,
        name: str,
        tenant: str = "public",
        if_match: str | None = None,
        replace: bool = False,
        *,
        recipe: str | None = None,
    ) -> GeneratorInfo | None:
        """Refuses a name whose next version may not be written, before any work; what it holds, if its provenance names
        this recipe.

        Raises AdapterInvalid `bad_name`, AdapterConflict, PreconditionFailed, QuotaExceeded, StoreUnavailable.
        """
        names.check_name(name, *self._base.names, what="generator")
        names.check_tenant(tenant)
        self._catalogue.refresh_name(tenant, name)
        current = self._current(tenant, name)
        if current is not None and recipe is not None and current.info.provenance.get("recipe") == recipe:
            return _info(name, current)
        self._check_free(tenant, name, None, if_match, replace)
        self._quotas.check(tenant, [Wanted(name, "", 0)])
        return None

    def add(
        self,
        name: str,
        path: Path,
        event: str,
        provenance: Mapping[str, Any],
        losses: Sequence[Mapping[str, float]] = (),
        *,
        tenant: str = "public",
        if_match: str | None = None,
        replace: bool = False,
    ) -> tuple[GeneratorInfo, bool]:
        """Checks a generator's file, which anybody may have written, and stores it as the next version of a name;
        (info, True), or (info, False) if the name holds this file already. All or nothing.

        Raises AdapterInvalid `bad_name`, or what `generator_file.load` does, AdapterConflict,
        PreconditionFailed, QuotaExceeded, StorageFull or StoreUnavailable; OSError of `path`.
        """
        names.check_name(name, *self._base.names, what="generator")
        names.check_tenant(tenant)
        blobs, files = contents({GENERATOR_FILE: path})
        found = generator_file.load(path, self._base, self._limits, digest=blobs[GENERATOR_FILE].digest)
        told = _told(found, self._base, blobs[GENERATOR_FILE].size, provenance, losses)
        manifest = manifest_of(self._base, blobs[GENERATOR_FILE], blobs, told)
        for _ in range(_ATTEMPTS):
            self._catalogue.refresh_name(tenant, name)
            current = self._check_free(tenant, name, found.digest, if_match, replace)
            if current is not None:
                if not self._sound(current):
                    self._log.restore(manifest, files)
                return _info(name, current), False
            number = self._catalogue.newest(tenant, name) + 1
            with self._quotas.room(tenant, Wanted.of(name, manifest)):
                if record := self._log.commit(tenant, name, number, event, manifest, files):
                    self._catalogue.appended(tenant, name, record)
                    return _info(name, record), True
        raise names.busy(name)

    def delete(self, name: str, tenant: str = "public", if_match: str | None = None) -> None:
        """Appends a tombstone. Adapters that it has made keep their own hold of its file.

        Raises NameExpected, AdapterNotFound, PreconditionFailed.
        """
        names.require_name(name)
        for _ in range(_ATTEMPTS):
            found = self._found(name, tenant)
            if found is None:
                raise _not_found(name)
            names.check_match(_digest(found[1]), if_match)
            number = self._catalogue.newest(tenant, name) + 1
            if tombstone := self._log.commit(tenant, name, number, DELETED):
                self._catalogue.appended(tenant, name, tombstone)
                return
        raise names.busy(name)

    @contextmanager
    def opened(self, info: GeneratorInfo) -> Iterator[tuple[Generator, Path]]:
        """The generator itself, and its verified file for as long as the context lasts.

        Raises AdapterCorrupt, StoreUnavailable, AdapterInvalid.
        """
        with self._log.blob(Blob(info.digest, info.bytes)) as path:
            try:
                generator = generator_file.load(path, self._base, self._limits, digest=info.digest)
            except OSError as error:
                raise read_error(error, "file") from error
            yield generator, path

    def open_file(self, reference: str, tenant: str = "public") -> tuple[int, Iterator[bytes]]:
        """Size and bytes of the file, verified before the first block; closing the iterator releases it."""
        info = self.info(reference, tenant)
        stream = pieces(self._log.blob(Blob(info.digest, info.bytes)))
        next(stream)  # opens and verifies now, so that a damaged file is an error and not a cut answer
        return info.bytes, stream

    def _find(self, reference: str, tenant: str) -> tuple[str, Record]:
        for owner in _owners(tenant):
            if found := self._found(reference, owner):
                if found[1].generator is None:
                    raise AdapterCorrupt("This version's record is damaged; upload or train the generator again.")
                return found
        raise _not_found(reference)

    def _found(self, reference: str, tenant: str) -> tuple[str, Record] | None:
        """Of this tenant's own."""
        try:
            parsed = names.parse(reference)
        except AdapterNotFound:
            return None
        name, record = parsed.name, None
        if name is None:
            self._catalogue.catch_up()
            name, record = self._of_digest(tenant, parsed.digest)
        else:
            self._catalogue.refresh_name(tenant, name)
            record = self._current(tenant, name)
            if record is not None and parsed.version is not None:
                record = self._index.version(tenant, name, parsed.version)
        return None if name is None or record is None or record.deleted else (name, record)

    def _of_digest(self, tenant: str, digest: str | None) -> tuple[str | None, Record | None]:
        for owner, name in sorted(self._index.heads()):
            for record in reversed(self._index.versions(owner, name) if owner == tenant else ()):
                if record.generator is not None and _digest(record) == digest:
                    return name, record
        return None, None

    def _current(self, tenant: str, name: str) -> Record | None:
        return self._index.current(tenant, name)

    def _check_free(
        self, tenant: str, name: str, digest: str | None, if_match: str | None, replace: bool
    ) -> Record | None:
        """The current record if it holds this very file, None if a new version may be written."""
        current = self._current(tenant, name)
        held = _digest(current) if current is not None else None
        if current is not None and held == digest:
            return current
        if if_match is not None:
            names.check_match(held, if_match)
        elif current is not None and not replace:
            raise names.taken(name, current.version, held)
        return None

    def _sound(self, record: Record) -> bool:
        with suppress(AdapterCorrupt), self._log.blob(record.blobs[GENERATOR_FILE]):
            return True
        return False


def _told(
    found: Generator,
    base: BaseSpec,
    size: int,
    provenance: Mapping[str, Any],
    losses: Sequence[Mapping[str, float]],
) -> dict[str, Any]:
    """Fields of the manifest; those under `generator` are ours alone, the others every manifest has."""
    layout = found.layout
    ranks = [module.rank for module in layout.modules]
    rank = {"min": min(ranks), "max": max(ranks)}
    shape = {
        "modules": len(layout.modules),
        "targets": sorted({module.name.rpartition(".")[2] for module in layout.modules}),
        "rank": rank,
        "numbers": layout.numbers,
        "dtype": layout.to_json()["dtype"],
    }
    return {
        "kind": KIND,
        "forms": ["low_rank"],
        "rank": rank,
        "modules": {"matched": len(layout.modules), "total": len(base.modules)},
        "parameters": found.parameters,
        "warnings": [],
        "provenance": dict(provenance),
        "generator": {
            "layout": shape,
            "tasks": list(found.tasks),
            "condition": found.condition,
            "latent": found.latent,
            "losses": _thinned(losses),
            "sizes": asdict(recipe.sizes(_recipe_bytes(found, layout), layout, size)),
        },
    }


def _recipe_bytes(found: Generator, layout: Layout) -> int:
    """Of any recipe of this generator, for all have vectors of the same lengths."""
    parts = torch.zeros(len(layout.counts()))
    blank = recipe.Recipe(
        "0" * 64, torch.zeros(found.condition), Statistics(parts, parts.clone()), torch.zeros(found.latent), "0" * 64
    )
    return len(recipe.encode(blank))


def _thinned(losses: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """At most `MAX_LOSSES` of them, evenly, the last one among them."""
    step = -(-len(losses) // MAX_LOSSES) or 1
    return list(losses[::-1][::step][::-1])


def _info(name: str, record: Record) -> GeneratorInfo:
    told, info = record.generator or _NOTHING, record.info
    return GeneratorInfo(
        name=name,
        version=record.version,
        digest=_digest(record),
        base=info.base,
        layout=told["layout"],
        tasks=told["tasks"],
        condition=told["condition"],
        latent=told["latent"],
        parameters=info.parameters,
        bytes=info.bytes,
        created=info.created,
        event=record.event,
        provenance=info.provenance,
        losses=told["losses"],
        sizes=told["sizes"],
        warnings=info.warnings,
    )


def _digest(record: Record) -> str:
    return record.blobs[GENERATOR_FILE].digest if record.generator is not None else ""


def _owners(tenant: str) -> tuple[str, ...]:
    return (tenant,) if tenant == PUBLIC else (tenant, PUBLIC)


def _not_found(reference: str) -> AdapterNotFound:
    text = f"The generator `{shorten(reference)}` does not exist."
    return AdapterNotFound(text, code="generator_not_found", param="generator")
