"""What the API needs from the rest: the engine and the registry as protocols, and its own settings."""

import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from adapters_store.compression.jointly import JointRecipe
from adapters_store.compression.recipe import Bounds, Recipe
from adapters_store.generation.orders import TaskSpec, Wanted
from adapters_store.generators import GeneratorInfo
from adapters_store.info import AdapterInfo, AdapterRef
from server.access.key import Key
from server.api.drain import Drain
from server.api.tracing import Tracer
from server.engine.request import GenerationRequest, StepOutput, WeightedAdapter
from server.engine.status import EngineInfo, EngineStats, ExpertLoad, Residency, TokenizerFacts
from server.jobs.job import Job
from server.metrics import Metrics
from server.replicas.rate import Rate, Taken
from server.replicas.state import LinkState, Member, SharingStats


class Tokenizer(Protocol):
    """Text to tokens and back. Synchronous: the API calls the slow ones off the loop."""

    @property
    def facts(self) -> TokenizerFacts: ...
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str: ...
    def token_text(self, token_id: int) -> str: ...
    def is_special(self, token_id: int) -> bool: ...
    def render_chat(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str: ...


class GenerationStream(Protocol):
    """The outputs of one request. `aclose` aborts it if unfinished; calling it again does nothing."""

    @property
    def request_id(self) -> str: ...
    def __aiter__(self) -> AsyncIterator[StepOutput]: ...
    async def aclose(self) -> None: ...
    async def __aenter__(self) -> Self: ...
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Engine(Protocol):
    """Requests in, tokens out."""

    @property
    def info(self) -> EngineInfo: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    def stats(self) -> EngineStats: ...
    def healthy(self) -> bool: ...
    def ready(self) -> bool: ...
    def check_capacity(self, count: int, tenant: str, adapters: Sequence[WeightedAdapter]) -> None: ...
    async def submit(self, request: GenerationRequest) -> GenerationStream: ...
    def residency(self, digest: str) -> Residency: ...
    def pinned(self, digest: str) -> bool: ...
    async def warm(self, digest: str) -> None: ...
    async def pin(self, digest: str) -> None: ...
    async def unpin(self, digest: str) -> None: ...
    def merged(self, digest: str) -> bool: ...
    async def merge_into_base(self, digest: str) -> None: ...
    async def take_out_of_base(self, digest: str) -> None: ...
    async def experts(self, digest: str) -> Mapping[str, ExpertLoad]: ...


class Keys(Protocol):
    """The API keys of this moment. `find` raises InvalidKey, or NotReady while there is nothing to compare with."""

    def find(self, secret: str) -> Key: ...


class Audit(Protocol):
    """The record of changes; a line that cannot be written is its own concern. Blocking."""

    def write(self, fields: Mapping[str, Any]) -> None: ...


class Intake(Protocol):
    """The way in for uploads; the answer is the version, and whether it is new."""

    async def add(
        self,
        name: str,
        config: bytes,
        weights: Path,
        *,
        tenant: str = "public",
        if_match: str | None = None,
        replace: bool = False,
    ) -> tuple[AdapterInfo, bool]: ...


class Registry(Protocol):
    """Adapters by name. `resolve` is a lookup in memory; the others may touch the disk.

    A tenant reads its own adapters and, behind them, the public ones; what changes something takes its own alone.
    Other servers may write to the same store: `Replicas.ensure` comes before the look-up of a name.
    """

    def resolve(self, reference: str, tenant: str = "public") -> AdapterRef: ...
    def info(self, reference: str, tenant: str = "public") -> AdapterInfo: ...
    def list(
        self, tenant: str = "public", cursor: str | None = None, limit: int = 100
    ) -> tuple[Sequence[AdapterInfo], str | None]: ...
    def versions(self, name: str, tenant: str = "public") -> Sequence[AdapterInfo]: ...
    def delete(self, name: str, tenant: str = "public", if_match: str | None = None) -> None: ...
    def rollback(self, name: str, version: int, tenant: str = "public") -> AdapterInfo: ...
    def held(self, digest: str) -> bool: ...
    def share_here(self, name: str, version: int, tenant: str = "public") -> float: ...
    def open_file(self, reference: str, filename: str, tenant: str = "public") -> tuple[int, Iterator[bytes]]: ...


class Replicas(Protocol):
    """The servers over the same store, this one among them. Nothing here waits for Redis longer than 0.05 s."""

    async def ensure(self, reference: str, tenant: str) -> None: ...
    @property
    def rate(self) -> Rate | None: ...
    async def take(self, client: str, rate: Rate, amount: int = 1) -> Taken: ...
    def settle(self, taken: Taken, used: int) -> None: ...
    def members(self) -> Sequence[Member]: ...
    def count(self) -> int: ...
    def link(self) -> LinkState: ...
    def stats(self) -> SharingStats: ...


class Compressor(Protocol):
    """Makes smaller versions of adapters; the answer is the version, whether it is new, and each module's error."""

    async def compress(
        self,
        source: AdapterRef,
        recipe: Recipe,
        bounds: Bounds,
        *,
        target: str | None = None,
        replace: bool = False,
        probe: Sequence[str] | None = None,
        tenant: str = "public",
    ) -> tuple[AdapterInfo, bool, dict[str, float]]: ...
    async def compress_jointly(
        self,
        sources: Sequence[AdapterRef],
        recipe: JointRecipe,
        bounds: Bounds,
        *,
        probe: Sequence[str] | None = None,
        tenant: str = "public",
    ) -> list[tuple[AdapterInfo, bool, dict[str, float]]]: ...


class Planned(Protocol):
    """A merge that may begin: the order of its job, the digest of its recipe, and what the name holds if it is this."""

    @property
    def order(self) -> Mapping[str, Any]: ...
    @property
    def recipe(self) -> str: ...
    @property
    def stored(self) -> AdapterInfo | None: ...


class Merger(Protocol):
    """Plans merges; blocking."""

    def plan(
        self,
        name: str,
        sources: Sequence[tuple[AdapterRef, float]],
        method: str,
        given: Mapping[str, Any],
        *,
        tenant: str = "public",
        if_match: str | None = None,
        replace: bool = False,
    ) -> Planned: ...


class Generators(Protocol):
    """Generators by name; blocking."""

    def info(self, reference: str, tenant: str = "public") -> GeneratorInfo: ...
    def list(
        self, tenant: str = "public", cursor: str | None = None, limit: int = 100
    ) -> tuple[Sequence[GeneratorInfo], str | None]: ...
    def add(
        self,
        name: str,
        path: Path,
        event: str,
        provenance: Mapping[str, Any],
        *,
        tenant: str = "public",
        if_match: str | None = None,
        replace: bool = False,
    ) -> tuple[GeneratorInfo, bool]: ...
    def delete(self, name: str, tenant: str = "public", if_match: str | None = None) -> None: ...
    def open_file(self, reference: str, tenant: str = "public") -> tuple[int, Iterator[bytes]]: ...


class PlannedTraining(Protocol):
    """A training that may begin, as `Planned`."""

    @property
    def order(self) -> Mapping[str, Any]: ...
    @property
    def recipe(self) -> str: ...
    @property
    def stored(self) -> GeneratorInfo | None: ...


class GeneratorTrainer(Protocol):
    """Plans trainings of generators; blocking. sources: with the task of each."""

    def plan(
        self,
        name: str,
        sources: Sequence[tuple[AdapterRef, str]],
        tasks: Mapping[str, TaskSpec],
        given: Mapping[str, Any],
        *,
        tenant: str = "public",
        if_match: str | None = None,
        replace: bool = False,
    ) -> PlannedTraining: ...


class Synthesizer(Protocol):
    """Makes adapters by generators; the answer is the version, and whether it is new."""

    async def synthesize(
        self,
        info: GeneratorInfo,
        name: str,
        wanted: Wanted,
        *,
        tenant: str = "public",
        if_match: str | None = None,
        replace: bool = False,
    ) -> tuple[AdapterInfo, bool]: ...


class Jobs(Protocol):
    """The queue of work that takes longer than a request."""

    async def submit(self, tenant: str, kind: str, order: Mapping[str, Any], key: str) -> Job: ...
    def add_done(
        self, tenant: str, kind: str, order: Mapping[str, Any], key: str, result: Mapping[str, Any]
    ) -> Job: ...
    def get(self, tenant: str, job_id: str) -> Job: ...
    def list(self, tenant: str) -> Sequence[Job]: ...
    async def cancel(self, tenant: str, job_id: str) -> Job: ...


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """Limits of the HTTP side. Sizes in bytes, times in seconds.

    staging: folder for uploads in flight. adapter_root: the only folder that `/v1/load_lora_adapter` may read, or None.
    merges_into_base: whether an adapter may be put into the base's own weights.
    min_upload_rate: bytes per second an upload must keep up once `upload_idle_seconds` have passed.
    loopback_only: whether only this machine can connect; then `Host` must name it, or be one of `allowed_hosts`. Web
    pages of `allowed_hosts` (names without ports) may also change things here, as those of the server's own host may.
    max_upload_bodies: uploads that may arrive at a time; max_uploads: those that may be checked and stored.
    """

    staging: Path
    adapter_root: Path | None = None
    merges_into_base: bool = False
    max_upload_bytes: int = 2 << 30
    max_config_bytes: int = 256 << 10
    max_json_bytes: int = 2 << 20
    upload_idle_seconds: float = 30.0
    min_upload_rate: int = 16 << 10
    max_upload_bodies: int = 64
    max_uploads: int = 8
    loopback_only: bool = False
    allowed_hosts: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Services:
    """Everything a route may use, built once by `server.app`. keys: None where everybody may do all."""

    engine: Engine
    adapters: Registry
    intake: Intake
    compressor: Compressor
    replicas: Replicas
    metrics: Metrics
    settings: ApiSettings
    merger: Merger = field(kw_only=True)
    jobs: Jobs = field(kw_only=True)
    generators: Generators = field(kw_only=True)
    trainer: GeneratorTrainer = field(kw_only=True)
    synthesizer: Synthesizer = field(kw_only=True)
    keys: Keys | None = field(default=None, kw_only=True)
    audit: Audit | None = field(default=None, kw_only=True)
    drain: Drain = field(default_factory=Drain)
    tracer: Tracer | None = None
    started: int = field(default_factory=lambda: int(time.time()))
