"""The engine's step: load adapters, schedule, run the model, hand out tokens. One thread calls it."""

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from adapters_store.errors import CodedError
from adapters_store.forms import AdapterWeights
from server.engine.adapter_loader import AdapterLoader, Loaded
from server.engine.adapter_storage import AdapterStorage
from server.engine.answer import Answer
from server.engine.background_compiler import BackgroundCompiler
from server.engine.batch import ScheduledBatch, ScheduledSequence
from server.engine.copiers import Arrival
from server.engine.expert_watch import ExpertWatch
from server.engine.model_runner import ModelRunner
from server.engine.packing import PackedAdapter
from server.engine.quarantine import Quarantine
from server.engine.request import TRIAL, FinishReason, StepOutput, WeightedAdapter, named
from server.engine.sampler import Sampled
from server.engine.scheduler import Scheduler
from server.engine.sequence import digests_of, ids_of
from server.engine.status import EngineStats, Residency
from server.engine.step_watch import StepWatch
from server.errors import EngineFailure, ModelOutputInvalid, NotReady

LOADS_IN_FLIGHT = 4  # adapters being read or waiting for room in the pool
PREFETCHES = 8  # further wishes that are brought into host memory meanwhile

log = logging.getLogger(__name__)

Outputs = list[tuple[str, StepOutput]]


@dataclass(slots=True)
class _Counters:
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    last_step: float = field(default_factory=time.monotonic)


class EngineCore:
    """Sequences in, outputs out. A request's failure is an output of that request; the engine goes on."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        storage: AdapterStorage,
        loader: AdapterLoader,
        compiler: BackgroundCompiler | None = None,
    ) -> None:
        self.scheduler = scheduler
        self._runner = runner
        self._storage = storage
        self.loader = loader
        self.compiler = compiler
        self._answers: dict[str, Answer] = {}
        self._staged: list[PackedAdapter] = []  # loaded, waiting for room in the pool
        self._prefetched: frozenset[str] = frozenset()  # wishes that host memory was told of
        self._pool_state: tuple[int, int, frozenset[str]] = (0, 0, frozenset())
        self._without_room: set[str] = set()  # staged adapters for which the pool had no place in that state
        self._arrivals: list[tuple[str, Arrival]] = []  # placed, their bytes are on the way
        self._quarantine = Quarantine()
        self.merged = runner.merged
        self.experts = ExpertWatch(storage, scheduler.adapters, TRIAL)
        self._counters = _Counters()
        self.watch = StepWatch(loader.seconds)
        self.blocked = False
        self.stats = EngineStats()  # replaced whole after every change, so that other threads may read it

    @property
    def has_work(self) -> bool:
        """True while a sequence waits or runs, or an adapter is on its way."""
        return bool(self._answers or self._staged or self.scheduler.adapters.num_pending)

    def residency(self, digest: str) -> Residency:
        """Where an adapter is. Any thread may ask."""
        found = self.scheduler.adapters.residency(digest)
        return Residency.HOST if found is Residency.ABSENT and digest in self.loader.host else found

    def held(self) -> list[str]:
        """The adapters in device and host memory, but for those on trial. Any thread may ask."""
        found = {*self.scheduler.adapters.resident(), *self.loader.host.digests()}
        return sorted(digest for digest in found if not digest.startswith(TRIAL))

    def prefetch(self, adapters: Iterable[WeightedAdapter]) -> None:
        """Begin to read adapters that are about to be asked for, while the step before goes on. Any thread may ask.

        Not those on trial: what is read for nobody would stay when they are discarded.
        """
        residency = self.scheduler.adapters.residency
        digests = [adapter.digest for adapter in adapters if not adapter.digest.startswith(TRIAL)]
        self.loader.prefetch([digest for digest in digests if residency(digest) is Residency.ABSENT])

    def start(self) -> None:
        """Begin what runs beside the steps."""
        if self.compiler is not None:
            self.compiler.start()

    def prepare(self) -> bool:
        """Without work: prepare a little of what comes; False: there is nothing left to prepare."""
        return self._runner.prepare(self.scheduler.blocks.reach)

    def add(self, answer: Answer) -> Outputs:
        """Queue a request; refused at once if its adapter has been quarantined."""
        bad = self._quarantine.refused(answer.sequence.digests)
        if bad is not None:
            error = NotReady(
                f"{named(bad)} gave no valid numbers several times and is refused for some minutes. "
                "Check its weights (an `extreme_delta` warning?) and upload a mended one.",
                code="adapter_quarantined",
            )
            return [(answer.sequence.request_id, StepOutput(finish_reason=FinishReason.ERROR, error=error))]
        self.merged.make_way(answer.sequence.request.adapters)  # before the next step, so no step has both
        if not self._answers:
            self._counters.last_step = time.monotonic()
        self._answers[answer.sequence.request_id] = answer
        self.watch.added(answer.sequence)
        self.scheduler.add(answer.sequence)
        return []

    def abort(self, request_id: str) -> Outputs:
        """Drop a request and free what it holds; unknown or ended ones are ignored."""
        answer = self._answers.get(request_id)
        return [self._end(answer, StepOutput(finish_reason=FinishReason.ABORT))] if answer else []

    def discard(self, digest: str) -> Outputs:
        """Free what an adapter holds that nobody will ask for again; one that is in use stays."""
        self._staged = [adapter for adapter in self._staged if adapter.digest != digest]
        self.scheduler.adapters.discard(digest)
        self.loader.host.drop(digest)
        return []

    def merge_into_base(self, weights: AdapterWeights) -> None:
        """Until a request of anything else comes. Raises BaseInUse, and what `MergedBase.merge` raises."""
        self.merged.merge(weights, [answer.sequence.request.adapters for answer in self._answers.values()])

    def step(self) -> Outputs:
        """Do one round: begin to load what is asked for, place adapters that have arrived, compute a batch.

        Without outputs, running sequences or a placed adapter only the end of a load can bring the engine on; then
        `blocked` is true.
        """
        self.blocked = False
        self._counters.last_step = time.monotonic()
        adapters = self.scheduler.adapters
        placed, arriving = adapters.counters.loads, len(self._arrivals)
        self._begin_loads()  # before the batch is computed, so that they go on beside it
        outputs = self._place_adapters()
        batch = self.scheduler.schedule()
        if batch.entries:
            self.watch.begins(batch)
            outputs += self._compute(batch)
            self.watch.ends(batch)
            self._counters.steps += 1
        else:
            self._begin_loads()  # what scheduling found missing
            self._await_arrivals()
        arrived = arriving > len(self._arrivals)
        progress = outputs or self.scheduler.running or placed != adapters.counters.loads or arrived
        progress = progress or self.has_arrivals
        self.blocked = not progress
        self._counters.last_step = time.monotonic()
        self.publish()
        return outputs

    @property
    def has_arrivals(self) -> bool:
        """True when a load has ended and waits to be placed."""
        return self.loader.has_ended

    def seconds_since_step(self) -> float:
        """Seconds since the last step; 0 without requests or while all wait for loads. Any thread may ask."""
        return time.monotonic() - self._counters.last_step if self._answers and not self.blocked else 0.0

    def oldest_waiting_seconds(self) -> float:
        """Seconds since the request that has been in the queue for longest came; 0 without one. Any thread may ask."""
        waiting = list(self.scheduler.waiting)
        return time.monotonic() - min(sequence.added for sequence in waiting) if waiting else 0.0

    def close(self) -> None:
        """End the threads of the loader and the compiler; the core takes no further step."""
        if self.compiler is not None:
            self.compiler.stop()
        self.loader.close()

    def check_integrity(self) -> None:
        """Assert that everything held belongs to a live request."""
        self.scheduler.check_integrity()
        live = {s.request_id for s in self.scheduler.running} | {s.request_id for s in self.scheduler.waiting}
        if live != self._answers.keys():
            raise AssertionError(f"answers {sorted(self._answers)} are not the sequences {sorted(live)}")

    def publish(self) -> None:
        """Renew `stats`."""
        scheduler, adapters, counters = self.scheduler, self.scheduler.adapters, self._counters
        blocks, loader = scheduler.blocks, self.loader
        self.experts.look(now=not self._answers)
        self.stats = EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_usage=1 - blocks.num_free / (blocks.num_blocks - blocks.num_lent),
            kv_blocks_free=blocks.num_free,
            prefix_query_tokens_total=scheduler.num_prefix_queries,
            prefix_hit_tokens_total=scheduler.num_prefix_hits,
            prompt_tokens_total=counters.prompt_tokens,
            generated_tokens_total=counters.generated_tokens,
            steps_total=counters.steps,
            preemptions_total=scheduler.num_preemptions,
            adapters_resident=adapters.num_resident,
            adapter_bytes_used=adapters.bytes_used,
            adapter_hits_total=adapters.counters.hits,
            adapter_misses_total=adapters.counters.misses,
            adapter_loads_total=adapters.counters.loads,
            adapter_evictions_total=adapters.counters.evictions,
            adapter_load_failures_total=adapters.counters.failures,
            adapters_host=len(loader.host),
            host_bytes_used=loader.host.bytes_used,
            host_hits_total=loader.host.counters.hits,
            host_misses_total=loader.host.counters.misses,
            host_evictions_total=loader.host.counters.evictions,
            kv_blocks_lent=blocks.num_lent,
            running_adapters=digests_of(scheduler.running),
            waiting_adapters=digests_of(scheduler.waiting),
            gated_adapters_resident=self.experts.resident,
            expert_entropies=self.experts.entropies,
            merged_into_base=int(self.merged.digest is not None),
        )

    def _begin_loads(self) -> None:
        adapters = self.scheduler.adapters
        for digest in adapters.take_wanted(LOADS_IN_FLIGHT, urgent=self.scheduler.awaited):
            self.watch.load_begins(digest)
            self.loader.start(digest)
        wished = adapters.next_wanted(PREFETCHES)
        self.loader.prefetch([digest for digest in wished if digest not in self._prefetched])
        self._prefetched = frozenset(wished)  # once for each wish: a host cache too small for all would read for ever

    def _await_arrivals(self) -> None:
        """With nothing else to do the step waits for bytes on their way to the device: nothing else tells of them."""
        for digest, arrival in self._arrivals:
            arrival.wait()
            self.scheduler.adapters.arrived(digest)
        self._arrivals.clear()

    def _place_adapters(self) -> Outputs:
        outputs: Outputs = []
        for digest, arrival in list(self._arrivals):
            if arrival.done():
                self.scheduler.adapters.arrived(digest)
                self._arrivals.remove((digest, arrival))
        for loaded in self.loader.poll():
            if not self.scheduler.adapters.expects(loaded.digest):
                self.loader.host.drop(loaded.digest)  # discarded while it was read
                continue
            if loaded.adapter is None:
                outputs += self._fail_load(loaded)
            else:
                self._staged.append(loaded.adapter)
        awaited = self.scheduler.awaited
        self._staged.sort(key=lambda adapter: adapter.digest not in awaited)
        for adapter in list(self._staged):
            awaited = self.scheduler.awaited  # another head, once a failure has ended the one before
            if self._place(adapter, awaited):
                self._staged.remove(adapter)
            elif not self.scheduler.adapters.can_ever_hold(adapter.num_bytes):
                self._staged.remove(adapter)
                outputs += self._fail_load(Loaded(adapter.digest, None, _too_large(adapter)))
            elif self.scheduler.running or self._arrivals:
                continue  # these will make room
            elif adapter.digest in awaited or not self.scheduler.waiting:
                outputs += self._refuse(adapter)
        return outputs

    def _place(self, adapter: PackedAdapter, awaited: frozenset[str]) -> bool:
        """Give a loaded adapter its place in the pool, if there is room."""
        adapters = self.scheduler.adapters
        state = (adapters.changes, adapters.blocks.releases, awaited)
        if state != self._pool_state:
            self._pool_state, self._without_room = state, set()
        if adapter.digest in self._without_room:
            return False  # as at the last step: asking costs some milliseconds
        placement = adapters.place(adapter.digest, adapter.sizes, awaited, adapter.shared_sizes)
        if placement is None:
            self._without_room.add(adapter.digest)
            return False
        started = time.monotonic()
        arrival = self._storage.write(placement, adapter)
        self.loader.seconds.place.observe(time.monotonic() - started)
        self.watch.load_ends(adapter.digest)
        if arrival is not None:
            adapters.await_bytes(adapter.digest)
            self._arrivals.append((adapter.digest, arrival))
        return True

    def _refuse(self, adapter: PackedAdapter) -> Outputs:
        """The head of the queue has no room for this adapter beside its others; who else waits for it still may."""
        error = _too_large(adapter)
        log.warning("adapter_memory_full", extra={"digest": adapter.digest, "bytes": adapter.num_bytes})
        waiting = self.scheduler.waiting
        outputs = [self._fail(waiting.head.request_id, error)] if waiting.head is not None else []
        if not any(adapter.digest in sequence.digests for sequence in waiting):
            self._staged.remove(adapter)
            self.scheduler.adapters.unpin(adapter.digest)  # a pin that cannot be kept is not pretended
            self.scheduler.adapters.fail(adapter.digest)
        return outputs

    def _fail_load(self, loaded: Loaded) -> Outputs:
        """Every request that waits for this adapter gets the reason; others do not notice."""
        waiting = [s for s in self.scheduler.waiting if loaded.digest in s.digests]
        facts = {"digest": loaded.digest, "reason": str(loaded.error), "requests": ids_of(waiting)}
        log.warning("adapter_load_failed", extra=facts)
        self.scheduler.adapters.unpin(loaded.digest)
        self.scheduler.adapters.fail(loaded.digest)
        return [self._fail(sequence.request_id, loaded.error) for sequence in waiting]

    def _compute(self, batch: ScheduledBatch) -> Outputs:
        try:
            sampled = self._runner.run(batch, self._answers)
        except Exception:
            log.exception("step_failed", extra={"requests": ids_of(entry.sequence for entry in batch.entries)})
            return self._compute_alone(batch)
        outputs: Outputs = []
        for entry, chosen in zip(batch.entries, sampled, strict=True):
            outputs += self._settled(entry, chosen)
        return outputs

    def _compute_alone(self, batch: ScheduledBatch) -> Outputs:
        """After a failed step run each sequence by itself, so that only those at fault end."""
        outputs: Outputs = []
        for entry in batch.entries:
            try:
                [chosen] = self._runner.run(ScheduledBatch((entry,)), self._answers)
            except Exception as error:
                log.exception("request_failed", extra={"request_id": entry.sequence.request_id})
                failure = EngineFailure(f"The model could not compute this request ({type(error).__name__}).")
                outputs.append(self._fail(entry.sequence.request_id, failure))
            else:
                outputs += self._settled(entry, chosen)
        return outputs

    def _settled(self, entry: ScheduledSequence, chosen: Sampled | None) -> Outputs:
        """`_settle`, whose failure (a tokenizer's or a grammar's) is that request's own."""
        try:
            return self._settle(entry, chosen)
        except CodedError as error:
            log.warning("request_failed", extra={"request_id": entry.sequence.request_id, "code": error.code})
            return [self._fail(entry.sequence.request_id, error)]
        except Exception as error:
            log.exception("request_failed", extra={"request_id": entry.sequence.request_id})
            failure = EngineFailure(f"The answer could not be put together ({type(error).__name__}).")
            return [self._fail(entry.sequence.request_id, failure)]

    def _settle(self, entry: ScheduledSequence, chosen: Sampled | None) -> Outputs:
        """Book an entry's computed tokens and pass on its new token."""
        sequence = entry.sequence
        self.scheduler.computed(entry)
        self._counters.prompt_tokens += max(
            0, min(entry.start + entry.count, sequence.num_prompt) - max(entry.start, sequence.num_virtual)
        )
        if chosen is None:
            return []
        answer = self._answers[sequence.request_id]
        if chosen.token_id is None:
            self._quarantine.blame(sequence.request.adapters)
            return [self._fail(sequence.request_id, ModelOutputInvalid("The model's output has no valid numbers."))]
        if sequence.max_tokens == 0:
            done = StepOutput(prompt=answer.prompt(), finish_reason=FinishReason.LENGTH)
            return [self._end(answer, done)]
        output = answer.accept(chosen)
        self._counters.generated_tokens += 1
        return [self._end(answer, output) if output.finish_reason else (sequence.request_id, output)]

    def _fail(self, request_id: str, error: CodedError | None) -> tuple[str, StepOutput]:
        return self._end(self._answers[request_id], StepOutput(finish_reason=FinishReason.ERROR, error=error))

    def _end(self, answer: Answer, output: StepOutput) -> tuple[str, StepOutput]:
        """The one way out for every request: finished, failed or aborted."""
        sequence = answer.sequence
        del self._answers[sequence.request_id]
        self.scheduler.remove(sequence)
        self.watch.ended(sequence)
        if sequence.request.traced:
            output = replace(output, timeline=self.watch.timeline(sequence))
        return sequence.request_id, output


def _too_large(adapter: PackedAdapter) -> NotReady:
    return NotReady(
        f"{named(adapter.digest)} ({adapter.num_bytes} bytes) does not fit the adapter memory "
        "beside what this request and pins need; raise --adapter-memory or --device-memory.",
        code="adapter_memory_full",
    )
