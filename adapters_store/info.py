"""What the store tells about an adapter."""

from dataclasses import dataclass, field
from typing import Any, Literal

from adapters_store.variants import Knobs


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that an uploader should know, though the adapter was accepted. `code` is stable."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class RankRange:
    min: int
    max: int


@dataclass(frozen=True, slots=True)
class ModuleCount:
    matched: int
    total: int


@dataclass(frozen=True, slots=True)
class BaseName:
    id: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class BaseCheck:
    """How an upload was found to belong to the base. by: `weights` (the file's copies of the base's own weights are
    equal to them), `name` (its config names this base, and all shapes agree), `shapes` (those alone) or
    `fingerprint` (it was made by a generator of this very base); named: what the config names.

    PEFT's files hold no fingerprint; the one of the base that they were checked against is in `BaseName`.
    """

    by: Literal["weights", "name", "shapes", "fingerprint"]
    named: str | None


@dataclass(frozen=True, slots=True)
class Probe:
    """What an adapter changed in the model's answers to a fixed text. tokens: positions looked at; max_change: largest
    change of any token's log probability, in nats; greedy_changed: share of positions with another likeliest token."""

    tokens: int
    max_change: float
    greedy_changed: float


@dataclass(frozen=True, slots=True)
class Proof:
    """What was found out about an upload before it was stored. reason: why there is no probe, where there is none."""

    modules: ModuleCount
    base: BaseCheck
    probe: Probe | None = None
    reason: Notice | None = None


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """An adapter resolved: immutable, so one request sees one content from its first token to its last.

    tenant: whose it is; knobs, virtual_tokens, invocation: as in `AdapterInfo`.
    """

    name: str
    version: int
    digest: str
    tenant: str = "public"
    knobs: Knobs = field(default_factory=dict, hash=False)
    virtual_tokens: int = 0
    invocation: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """One version of an adapter; `dataclasses.asdict` gives the JSON shape of the API.

    digest: SHA-256 of the manifest, the identity of the content; parameters: numbers in the file that act on the
    base; bytes: size of the weights file; created: ISO 8601, UTC; a deleted version has kind "deleted", no digest;
    proof: of uploads only, and None where an older Polyrank took them; knobs: what a request may choose of it
    (`adapters_store.variants`); virtual_tokens: how many it puts before the prompt; invocation: token ids from whose
    last occurrence in the prompt on it acts, or () for everywhere; tenant: whose it is.
    """

    name: str
    version: int
    digest: str
    kind: str
    forms: tuple[str, ...]
    rank: RankRange
    modules: ModuleCount
    parameters: int
    bytes: int
    base: BaseName
    created: str
    event: str
    provenance: dict[str, Any]
    compression: dict[str, Any] | None
    warnings: tuple[Notice, ...]
    proof: Proof | None = None
    knobs: Knobs = field(default_factory=dict)
    virtual_tokens: int = 0
    invocation: tuple[int, ...] = ()
    tenant: str = "public"
