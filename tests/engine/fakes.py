"""An engine core whose model, storage and loader are scripted, and which checks what it is asked to compute."""

import functools
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Set
from collections.abc import Sequence as TokenSequence

import torch

from adapters_store.errors import CodedError
from server.engine.adapter_loader import AdapterLoader, Loaded, LoadSeconds
from server.engine.adapter_pool import Placement
from server.engine.adapter_storage import AdapterStorage
from server.engine.answer import Answer
from server.engine.batch import ScheduledBatch, ScheduledSequence
from server.engine.copiers import Arrival
from server.engine.core import EngineCore, Outputs
from server.engine.grammar import GrammarState
from server.engine.host_cache import HostCache
from server.engine.merged_base import MergedBase
from server.engine.model_runner import ModelRunner
from server.engine.packing import PackedAdapter
from server.engine.request import FinishReason, SamplingParams, StepOutput
from server.engine.sampler import Sampled
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence
from server.engine.tokenizer import Tokenizer
from tests.engine.support import PAGE, check_batch, make_scheduler, make_sequence
from tests.support.models import EOS_ID, tiny_tokenizer

Content = tuple[object, tuple[int, ...]]


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer(tiny_tokenizer())


def identity(sequence: Sequence) -> object:
    """What a key or value depends on beside the tokens before it."""
    return (tuple((a.digest, a.weight) for a in sequence.request.adapters), sequence.request.tenant)


def next_token(sequence: Sequence) -> int:
    """The scripted model: a function of adapters and tokens alone; plain bytes, never a special token."""
    return 3 + zlib.crc32(repr((identity(sequence), sequence.tokens)).encode()) % 250


def expected_tokens(
    prompt: TokenSequence[int],
    max_tokens: int,
    adapters: Iterable[str | tuple[str, float]] = (),
    tenant: str = "tenant",
) -> list[int]:
    """What the scripted model says to a request that is alone."""
    sequence = make_sequence("alone", prompt, adapters=adapters, tenant=tenant)
    for _ in range(max_tokens):
        sequence.tokens.append(next_token(sequence))
    return sequence.output


class FakeArrival:
    """Bytes that have arrived after so many looks, or when they are waited for."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def done(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def wait(self) -> None:
        self.looks = -1


class FakeStorage(AdapterStorage):
    """Remembers what each line of the buffer holds (a page is one, so is a KV block), and who is in each slot.

    on_write: told which lines an adapter takes; looks: as for `FakeArrival`, 0 for bytes that are there at once.
    """

    def __init__(self) -> None:
        self._gates = {}  # no adapter here chooses its ranks
        self.slots: dict[int, tuple[str, tuple[int, ...], tuple[object, ...]]] = {}
        self.lines: dict[int, object] = {}
        self.written: list[str] = []
        self.on_write: Callable[[int], None] = lambda line: None
        self.looks = 0
        self.arrivals: dict[str, FakeArrival] = {}

    def write(self, placement: Placement, adapter: PackedAdapter) -> Arrival | None:
        content: list[object] = [(adapter.digest, index) for index in range(len(adapter.own))]
        fresh = [True] * len(content)
        for key, blocks in adapter.shared.items():
            content += [(key, index) for index in range(len(blocks))]
            fresh += [key in placement.fresh] * len(blocks)
        for offset, what, new, block in zip(placement.offsets, content, fresh, adapter.blocks, strict=True):
            for line in range(offset // 64, -(-(offset + block.numel()) // 64)):
                if new:
                    self.on_write(line)
                    self.lines[line] = what
        self.slots[placement.slot] = (adapter.digest, placement.offsets, tuple(content))
        self.written.append(adapter.digest)
        if not self.looks:
            return None
        self.arrivals[adapter.digest] = FakeArrival(self.looks)
        return self.arrivals[adapter.digest]

    def holds(self, slot: int, digest: str) -> bool:
        """True if the slot is this adapter's, its bytes have arrived, and every block of it is as it was written."""
        owner, offsets, content = self.slots.get(slot, ("", (), ()))
        arrived = digest not in self.arrivals or self.arrivals[digest].looks < 0
        return (
            arrived
            and owner == digest
            and all(self.lines.get(offset // 64) == what for offset, what in zip(offsets, content, strict=True))
        )


class FakeLoader(AdapterLoader):
    """Loads end when the test says so.

    pages: size of each adapter, 1 page unless given; whole: as one block; bases: adapters with a shared part, to its
    pages: those of as many pages share theirs.
    """

    def __init__(self) -> None:
        self.host = HostCache(0)
        self.seconds = LoadSeconds()
        self.prefetched: list[str] = []
        self.pages: dict[str, int] = {}
        self.bases: dict[str, int] = {}
        self.whole: set[str] = set()
        self.started: list[str] = []
        self.history: list[str] = []
        self.ended: list[Loaded] = []

    def start(self, digest: str) -> None:
        assert digest not in self.started, f"{digest} is loaded twice at once"
        self.started.append(digest)
        self.history.append(digest)

    def prefetch(self, digests: Iterable[str]) -> None:
        self.prefetched += digests

    def poll(self) -> list[Loaded]:
        ended, self.ended = self.ended, []
        return ended

    @property
    def has_ended(self) -> bool:
        return bool(self.ended)

    def close(self) -> None:
        self.started.clear()

    def end(self, digest: str, error: CodedError | None = None) -> None:
        """The load ends, well or with an error."""
        self.started.remove(digest)
        pages = self.pages.get(digest, 1)
        sizes = [pages * PAGE] if digest in self.whole else [PAGE] * pages
        blocks = tuple(torch.zeros(size, dtype=torch.uint8) for size in sizes)
        basis = self.bases.get(digest, 0)
        shared = {b"basis %d" % basis: (torch.zeros(PAGE, dtype=torch.uint8),) * basis} if basis else {}
        self.ended.append(Loaded(digest, None if error else PackedAdapter(digest, blocks, {}, shared), error))


class NothingMerged(MergedBase):
    """There are no weights to merge into."""

    def __init__(self) -> None:
        self.digest = None


class FakeRunner(ModelRunner):
    """Says `next_token`, and keeps a model of the KV pool: which tokens under which adapters each slot holds.

    faulty: request ids whose presence fails a step; invalid: those whose logits are NaN. `problems` collects what the
    scheduler got wrong, as an exception here would count as a failed step.
    """

    def __init__(self, scheduler: Scheduler, storage: FakeStorage) -> None:
        self.scheduler = scheduler
        self.storage = storage
        self.merged = NothingMerged()
        self.faulty: set[str] = set()
        self.invalid: set[str] = set()
        self.forced: dict[str, int] = {}
        self.written: dict[tuple[int, int], Content] = {}
        self.runs: list[list[str]] = []
        self.problems: list[str] = []
        storage.on_write = self._lose

    def prepare(self, blocks: int) -> bool:
        return False

    def run(self, batch: ScheduledBatch, answers: Mapping[str, Answer]) -> list[Sampled | None]:
        self.runs.append([entry.sequence.request_id for entry in batch.entries])
        try:
            check_batch(self.scheduler, batch)
        except AssertionError as error:
            self.problems.append(str(error))
        written: dict[tuple[int, int], str] = {}
        for entry in batch.entries:
            self._check_adapters(entry)
            for position in range(entry.start, entry.start + entry.count):
                slot = self._slot(entry.sequence, position)
                if slot in written:
                    self.problems.append(f"{entry.sequence.request_id} and {written[slot]} write one KV slot")
                written[slot] = entry.sequence.request_id
                self.storage.lines.pop(slot[0], None)  # the same memory
                self.written[slot] = self._content(entry.sequence, position)
        if bad := self.faulty.intersection(self.runs[-1]):
            raise RuntimeError(f"scripted failure of {sorted(bad)}")
        for entry in batch.entries:
            self.check_kv(entry.sequence, entry.start + entry.count)
            if entry.sequence.wants_prompt_logprobs:
                known = range(entry.start, min(entry.start + entry.count, entry.sequence.num_prompt - 1))
                entry.sequence.prompt_logprobs |= {position + 1: (-float(position), ()) for position in known}
        return [self._sampled(entry, answers) if entry.samples else None for entry in batch.entries]

    def _lose(self, line: int) -> None:
        """An adapter is written where a KV block was."""
        if any(line in sequence.block_table for sequence in self.scheduler.running):
            self.problems.append(f"an adapter is written over block {line}, which is in use")
        for slot in [slot for slot in self.written if slot[0] == line]:
            del self.written[slot]

    def check_kv(self, sequence: Sequence, computed: int) -> None:
        """Every computed position must hold this sequence's own prefix, computed under its own adapters."""
        for position in range(computed):
            found = self.written.get(self._slot(sequence, position))
            if found != self._content(sequence, position):
                self.problems.append(f"{sequence.request_id} reads {found} at position {position}")

    def _check_adapters(self, entry: ScheduledSequence) -> None:
        pool = self.scheduler.adapters
        for digest in entry.sequence.digests:
            if not self.storage.holds(pool.slot(digest), digest):
                self.problems.append(f"{entry.sequence.request_id} runs with a damaged adapter {digest}")

    def _slot(self, sequence: Sequence, position: int) -> tuple[int, int]:
        size = self.scheduler.blocks.block_size
        return sequence.block_table[position // size], position % size

    @staticmethod
    def _content(sequence: Sequence, position: int) -> Content:
        return identity(sequence), tuple(sequence.tokens[: position + 1])

    def _sampled(self, entry: ScheduledSequence, answers: Mapping[str, Answer]) -> Sampled:
        sequence = entry.sequence
        answers[sequence.request_id].sample_row()
        if sequence.request_id in self.invalid:
            return Sampled(None)
        return Sampled(self.forced.get(sequence.request_id, next_token(sequence)))


class Engine:
    """An EngineCore over the fakes, with the outputs of every request and the checks that hold after every call."""

    def __init__(self, *, looks: int = 0, **sizes: int) -> None:
        """sizes: as for `make_scheduler`; looks: steps that the bytes of an adapter are on their way."""
        self.scheduler = make_scheduler(**sizes)
        self.storage = FakeStorage()
        self.storage.looks = looks
        self.loader = FakeLoader()
        self.runner = FakeRunner(self.scheduler, self.storage)
        self.core = EngineCore(self.scheduler, self.runner, self.storage, self.loader)
        self.outputs: dict[str, list[StepOutput]] = defaultdict(list)

    def add(
        self,
        request_id: str,
        prompt: TokenSequence[int],
        *,
        adapters: Iterable[str | tuple[str, float]] = (),
        max_tokens: int = 4,
        tenant: str = "tenant",
        sampling: SamplingParams | None = None,
        grammar: GrammarState | None = None,
    ) -> Sequence:
        sequence = make_sequence(
            request_id, prompt, adapters=adapters, max_tokens=max_tokens, tenant=tenant, sampling=sampling
        )
        text = tokenizer().stream([])
        self._take(self.core.add(Answer(sequence, text, seed=0, eos_ids=(EOS_ID,), grammar=grammar)))
        return sequence

    def abort(self, request_id: str) -> None:
        self._take(self.core.abort(request_id))

    def step(self) -> Outputs:
        """One step of the engine thread, with the promises of `blocked` checked."""
        loads = self.scheduler.adapters.counters.loads
        runs, arriving = len(self.runner.runs), len(self.core._arrivals)
        outputs = self.core.step()
        self._take(outputs)
        moved = bool(outputs) or len(self.runner.runs) > runs or self.scheduler.adapters.counters.loads > loads
        moved = moved or len(self.core._arrivals) < arriving
        if not self.core.blocked:
            assert moved, "nothing happened and the engine thread would spin"
        elif self.core.has_work and not self.loader.has_ended:
            assert self.loader.started, (
                "work is left, nothing is on its way, and the engine thread would sleep for ever"
            )
        if self.core.blocked:
            assert not self.scheduler.running
            assert not outputs
        return outputs

    def run(self, at_most: int = 300, fail: Set[str] = frozenset()) -> int:
        """Steps, and loads that end at once, until nothing is left; how many steps it took."""
        for count in range(at_most):
            if not self.core.has_work:
                return count
            self.step()
            for digest in list(self.loader.started):
                self.loader.end(digest, CodedError("scripted", code="scripted") if digest in fail else None)
        raise AssertionError(f"not done after {at_most} steps: {sorted(self.core._answers)}")

    def resting(self) -> bool:
        """Methods, for mypy takes a property that was read once to stay what it was."""
        return self.core.blocked

    def working(self) -> bool:
        return self.core.has_work

    def has_arrivals(self) -> bool:
        return self.core.has_arrivals

    def tokens(self, request_id: str) -> list[int]:
        return [output.token_id for output in self.outputs[request_id] if output.token_id is not None]

    def reason(self, request_id: str) -> FinishReason | None:
        outputs = self.outputs[request_id]
        return outputs[-1].finish_reason if outputs else None

    def error(self, request_id: str) -> CodedError:
        last = self.outputs[request_id][-1]
        assert last.finish_reason is FinishReason.ERROR
        assert last.error is not None
        return last.error

    def check(self) -> None:
        """What holds between any two calls."""
        self.core.check_integrity()
        for sequence in self.scheduler.running:
            self.runner.check_kv(sequence, sequence.num_computed)
        assert not self.runner.problems, self.runner.problems[0]

    def _take(self, outputs: Outputs) -> None:
        for request_id, output in outputs:
            before = self.outputs[request_id]
            assert not before or before[-1].finish_reason is None, f"{request_id} has an output after its last"
            before.append(output)
        self.check()
