"""Bodies of the adapter routes."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from adapters_store import info
from server.api.dependencies import Caller
from server.api.schemas.sampling import Strict
from server.api.services import Services
from server.engine.status import ExpertLoad, Residency, mean_entropy

MAX_VERSION = 2**31 - 1
MAX_RANK = 2**16
MAX_COLLECTION = 128  # adapters in one call: 128 of rank 16 on all linears of the default model take 5 GB meanwhile
# On the example adapters: int8 1e-6, energy 0.9 at most 0.007, rank 1 0.02 to 0.035 (one: 6e-4), no adapter 0.1 to 1.4.
MAX_DIVERGENCE = 0.02
# Over an int8 base the smallest change of an adapter moves roundings of the base: 8-bit factors alone read 0.07 there.
MAX_DIVERGENCE_OVER_INT8 = 0.2
ProbeText = Annotated[str, Field(min_length=1, max_length=8192)]


class FromStore(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class Notice(FromStore):
    code: str
    message: str


class RankRange(FromStore):
    min: int
    max: int


class ModuleCount(FromStore):
    matched: int
    total: int


class BaseName(FromStore):
    id: str
    fingerprint: str


class BaseCheck(FromStore):
    """How the files were found to belong to the base: by their copies of its weights, by its name, by shapes alone, or
    by the fingerprint of the generator that made them. named: what their config names."""

    by: Literal["weights", "name", "shapes", "fingerprint"]
    named: str | None


class Probe(FromStore):
    """What the adapter changed in the base's distributions over a short text: tokens looked at, the largest change of
    any log probability in nats, and the share of tokens after which another one became the likeliest."""

    tokens: int
    max_change: float
    greedy_changed: float


class Proof(FromStore):
    """What was found out before an upload was stored; reason: why there is no probe, where there is none."""

    modules: ModuleCount
    base: BaseCheck
    probe: Probe | None
    reason: Notice | None


class AdapterInfo(FromStore):
    """One version of an adapter. `residency` (where it is nearest: device, host memory, disk), `progress` (while it is
    loading, the share of its bytes that this machine has), `pinned` and `merged_into_base` are this server's; the rest
    is the store's.

    `knobs`: what a request may choose of it, `{"rank": {"max": 8}}`, `{"gate": {"default": 0.5}}` or `{"task":
    {"count": 4}}`; `virtual_tokens`: how many it puts before the prompt; `invocation`: token ids from whose last
    occurrence in the prompt on it acts; `tenant`: whose it is, the caller's own or `public`.
    """

    name: str
    version: int
    digest: str
    kind: str
    forms: list[str]
    rank: RankRange
    modules: ModuleCount
    parameters: int
    bytes: int
    base: BaseName
    created: str
    event: str
    provenance: dict[str, Any]
    compression: dict[str, Any] | None
    warnings: list[Notice]
    proof: Proof | None
    knobs: dict[str, dict[str, int | float]]
    virtual_tokens: int
    invocation: list[int]
    tenant: str
    residency: Residency = Residency.ABSENT
    progress: float | None = None
    pinned: bool = False
    merged_into_base: bool = False


class AdapterList(BaseModel):
    """One page, and where the next begins."""

    adapters: list[AdapterInfo]
    next: str | None


class VersionList(BaseModel):
    versions: list[AdapterInfo]


class ModuleExperts(BaseModel):
    """Use of one module's ranks: `active` of `rank` for each token. shares: of all choices, by rank; entropy: of the
    shares, 1 where all ranks are used alike, null before the first token; unused: ranks that no token chose."""

    rank: int
    active: int
    tokens: int
    shares: list[float]
    entropy: float | None
    unused: int


class Experts(BaseModel):
    """How an adapter's tokens chose its ranks, on this server, since it came into device memory.

    gated: whether it has such a choice at all; modules: empty while it is not in device memory. tokens: of the module
    that saw most; entropy: the mean of the modules; unused: ranks of all modules that no token chose."""

    name: str
    version: int
    digest: str
    gated: bool
    residency: Residency
    tokens: int
    entropy: float | None
    unused: int
    modules: dict[str, ModuleExperts]


class RollbackRequest(Strict):
    version: Annotated[int, Field(ge=1, le=MAX_VERSION)]


class CompressRequest(Strict):
    """How to compress, and what must be kept. All that is left out: int8 factors of the same rank.

    dtype: of the factors, `native` leaves them as they are, `int4` takes int8 on embeddings; rank: the most that a
    module keeps; energy: the share of its squared Frobenius norm that its rank must keep; target: name of the result,
    by default the next version of the adapter itself; replace: `target` may hold other content. max_error: bound of the
    relative Frobenius error of all deltas; max_divergence: bound of the mean KL divergence of next-token distributions,
    in nats (if not given, 0.2 over an int8 base), over the positions of `probe` (of each prompt the last 256 tokens; by
    default six short texts of many kinds).
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    dtype: Literal["int8", "int4", "native"] = "int8"
    rank: Annotated[int, Field(ge=1, le=MAX_RANK)] | None = None
    energy: Annotated[float, Field(gt=0, le=1)] | None = None
    target: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    replace: bool = False
    max_error: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    max_divergence: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = MAX_DIVERGENCE
    probe: Annotated[list[ProbeText], Field(min_length=1, max_length=64)] | None = None


class CompressedAdapter(AdapterInfo):
    """The new version. `module_errors`: relative Frobenius error of each module's delta; `new`: false where the
    same content was current already."""

    module_errors: dict[str, float]
    new: bool


class JointCompressRequest(Strict):
    """How to compress a collection: every adapter becomes its name's next version, in bases that it shares with others.

    adapters: their names, no version; method: a full core for each adapter or a diagonal; rank: of the bases, at most;
    clusters: how many bases a module has, at most. The bounds are those of each adapter, and `probe` as in a
    `CompressRequest`.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    adapters: Annotated[list[Annotated[str, Field(max_length=512)]], Field(min_length=1, max_length=MAX_COLLECTION)]
    method: Literal["jd_full", "jd_diag"]
    rank: Annotated[int, Field(ge=1, le=MAX_RANK)]
    clusters: Annotated[int, Field(ge=1, le=MAX_COLLECTION)] = 1
    max_error: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    max_divergence: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = MAX_DIVERGENCE
    probe: Annotated[list[ProbeText], Field(min_length=1, max_length=64)] | None = None


class CompressedCollection(BaseModel):
    """The new versions, in the order of the names."""

    adapters: list[CompressedAdapter]


class LoadAdapterRequest(Strict):
    """vLLM's body. `lora_path` is a folder below the server's adapter root, absolute or relative to it."""

    lora_name: Annotated[str, Field(min_length=1, max_length=512)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False
    pinned: bool = False


class UnloadAdapterRequest(Strict):
    lora_name: Annotated[str, Field(min_length=1, max_length=512)]


def adapter_body(services: Services, caller: Caller, adapter: info.AdapterInfo) -> AdapterInfo:
    """What the store and the engine know, together."""
    body = AdapterInfo.model_validate(adapter)
    if adapter.digest:
        body.residency = services.engine.residency(adapter.digest)
        body.pinned = services.engine.pinned(adapter.digest)
        body.merged_into_base = services.engine.merged(adapter.digest)
        if body.residency in (Residency.ABSENT, Residency.LOADING):
            share = services.adapters.share_here(adapter.name, adapter.version, adapter.tenant)
            if body.residency is Residency.LOADING:
                body.progress = share
            elif share == 1:
                body.residency = Residency.DISK
    return body


def experts_body(adapter: AdapterInfo, loads: Mapping[str, ExpertLoad]) -> Experts:
    """loads: by module, as the engine has counted."""
    modules = {
        name: ModuleExperts(
            rank=len(load.counts),
            active=load.active,
            tokens=load.tokens,
            shares=load.shares,
            entropy=load.entropy,
            unused=load.unused,
        )
        for name, load in loads.items()
    }
    return Experts(
        name=adapter.name,
        version=adapter.version,
        digest=adapter.digest,
        gated="gated_low_rank" in adapter.forms,
        residency=adapter.residency,
        tokens=max((load.tokens for load in loads.values()), default=0),
        entropy=mean_entropy(loads),
        unused=sum(load.unused for load in loads.values()),
        modules=modules,
    )
