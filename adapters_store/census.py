"""What the adapters of a store are, counted: for metrics."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from adapters_store.records import Record


@dataclass(frozen=True, slots=True)
class Census:
    """Contents that are the current version of a name, each once.

    disk and absent: digests of those that are whole on this machine's disk, and of the others. compressed: how many of
    each dtype or method, of those that were compressed here; bytes and original_bytes: of the files of these and of the
    adapters they were made of, of which both are known; errors: their relative errors of the weights.
    """

    disk: frozenset[str] = frozenset()
    absent: frozenset[str] = frozenset()
    kinds: Mapping[str, int] = field(default_factory=dict)
    compressed: Mapping[str, int] = field(default_factory=dict)
    bytes: int = 0
    original_bytes: int = 0
    errors: tuple[float, ...] = ()


def take_census(current: Iterable[Record], sizes: Mapping[str, int], share_here: Callable[[Record], float]) -> Census:
    """sizes: bytes of each content by digest; share_here: share of a record's bytes on this machine's disk, 0 to 1."""
    records = {record.manifest: record for record in current if record.manifest is not None}
    disk = frozenset(digest for digest, record in records.items() if share_here(record) >= 1)
    kinds: dict[str, int] = {}
    compressed: dict[str, int] = {}
    errors: list[float] = []
    before = after = 0
    for record in records.values():
        info = record.info
        kinds[info.kind] = kinds.get(info.kind, 0) + 1
        if info.compression is None:
            continue
        how = str(info.compression.get("dtype", "native"))
        compressed[how] = compressed.get(how, 0) + 1
        errors.append(float(info.compression["relative_error"]))
        if source := sizes.get(str(info.provenance.get("source"))):
            before, after = before + source, after + info.bytes
    return Census(disk, frozenset(records) - disk, kinds, compressed, after, before, tuple(errors))
