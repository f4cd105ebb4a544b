"""Times and counts of the engine's steps, for its metrics: a few numbers for each row of a step, no tensors."""

import threading
import time

from adapters_store.histogram import Histogram
from server.engine.adapter_loader import LoadSeconds
from server.engine.batch import ScheduledBatch
from server.engine.request import TRIAL, Timeline
from server.engine.sequence import Sequence
from server.engine.status import AdapterUse, Figures

WAIT_BOUNDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.25, 2.5, 5, 10, 20, 40, 80, 160)
STEP_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)
ADAPTER_BOUNDS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKEN_BOUNDS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
MAX_LOADS = 1000  # whose times are kept
MAX_USES = 10_000  # adapters told apart between two readings
NEWEST_SHARE = 0.1  # of the last base step in the usual time of such steps


class StepWatch:
    """The engine thread writes; any thread reads `figures` and `take_uses`.

    What adapters cost is told from decode steps alone: the time of a step with adapters beside the usual time of steps
    of as many rows without any. Until such a step was seen, one with adapters is not compared.
    """

    def __init__(self, loads: LoadSeconds) -> None:
        self._loads = loads
        self._queue, self._prefill, self._decode = (Histogram(WAIT_BOUNDS) for _ in range(3))
        self._prompt_tokens, self._answer_tokens = Histogram(TOKEN_BOUNDS), Histogram(TOKEN_BOUNDS)
        self._adapters = Histogram(ADAPTER_BOUNDS)
        self._steps = {
            (kind, with_): Histogram(STEP_BOUNDS) for kind in ("decode", "prefill") for with_ in (True, False)
        }
        self._usual: dict[int, float] = {}  # rows -> seconds of a decode step without adapters
        self._compared = self._compared_base = 0.0
        self._began, self._decodes, self._distinct = 0.0, True, 0  # of the step that is computed
        self._load_times: dict[str, tuple[float, float]] = {}  # by digest, the last load's; the end is 0 until then
        self._uses: dict[str, AdapterUse] = {}
        self._lock = threading.Lock()

    def added(self, sequence: Sequence) -> None:
        sequence.added = time.monotonic()

    def load_begins(self, digest: str) -> None:
        self._load_times.pop(digest, None)
        self._load_times[digest] = (time.monotonic(), 0.0)
        if len(self._load_times) > MAX_LOADS:
            del self._load_times[next(iter(self._load_times))]

    def load_ends(self, digest: str) -> None:
        begun, _ = self._load_times.get(digest, (0.0, 0.0))
        if begun:
            self._load_times[digest] = (begun, time.monotonic())

    def timeline(self, sequence: Sequence) -> Timeline:
        """Of a sequence that has ended."""
        now = time.monotonic()
        loads = [(digest, *self._load_times.get(digest, (0.0, 0.0))) for digest in sequence.digests]
        return Timeline(
            added=sequence.added,
            begun=sequence.begun,
            answered=sequence.answered,
            ended=now,
            prompt_tokens=sequence.num_prompt - sequence.num_virtual,
            cached_tokens=max(0, sequence.num_cached - sequence.num_virtual),
            output_tokens=sequence.num_output,
            loads=tuple(load for load in loads if load[2] > sequence.added and load[1] < (sequence.begun or now)),
        )

    def begins(self, batch: ScheduledBatch) -> None:
        """A step is about to compute this batch."""
        self._began = now = time.monotonic()
        tokens: dict[str, int] = {}
        begun: list[Sequence] = []
        self._decodes = True
        for entry in batch.entries:
            sequence, count = entry.sequence, entry.count
            if not sequence.begun:
                sequence.begun = now
                begun.append(sequence)
            if count > 1 or entry.start < sequence.num_prompt - 1:
                self._decodes = False
            for adapter in sequence.request.adapters:
                tokens[adapter.digest] = tokens.get(adapter.digest, 0) + count
        self._distinct = len(tokens)
        self._adapters.observe(len(tokens))
        if tokens or begun:
            self._note(tokens, begun)

    def ends(self, batch: ScheduledBatch) -> None:
        """The step that began last has computed its batch, and the tokens are appended."""
        now = time.monotonic()
        seconds = now - self._began
        for entry in batch.entries:
            sequence = entry.sequence
            if not sequence.answered and len(sequence.tokens) > sequence.num_prompt:
                self._answered(sequence, now)
        self._steps["decode" if self._decodes else "prefill", self._distinct > 0].observe(seconds)
        if self._decodes:
            self._compare(len(batch.entries), seconds)

    def ended(self, sequence: Sequence) -> None:
        """A sequence leaves, finished or not. One without a token has no time of decoding and no sizes."""
        if sequence.num_output:
            now = time.monotonic()
            if not sequence.answered:
                self._answered(sequence, now)
            self._decode.observe(now - sequence.answered)
            self._prompt_tokens.observe(sequence.num_prompt)
            self._answer_tokens.observe(sequence.num_output)

    def figures(self) -> Figures:
        """All since the start."""
        loads = self._loads
        return Figures(
            queue_seconds=self._queue.now(),
            prefill_seconds=self._prefill.now(),
            decode_seconds=self._decode.now(),
            prompt_tokens=self._prompt_tokens.now(),
            answer_tokens=self._answer_tokens.now(),
            adapters_per_step=self._adapters.now(),
            step_seconds=tuple((kind, with_, found.now()) for (kind, with_), found in self._steps.items()),
            load_seconds=(("read", loads.read.now()), ("pack", loads.pack.now()), ("place", loads.place.now())),
            compared_seconds=self._compared,
            compared_base_seconds=self._compared_base,
        )

    def take_uses(self) -> dict[str, AdapterUse]:
        """By digest, since the last call; beyond `MAX_USES` adapters under the empty digest."""
        with self._lock:
            uses, self._uses = self._uses, {}
        return uses

    def _answered(self, sequence: Sequence, now: float) -> None:
        sequence.answered = now
        self._prefill.observe(now - sequence.begun)

    def _compare(self, rows: int, seconds: float) -> None:
        usual = self._usual.get(rows)
        if not self._distinct:
            self._usual[rows] = seconds if usual is None else usual + NEWEST_SHARE * (seconds - usual)
        elif usual is not None:
            self._compared += seconds
            self._compared_base += usual

    def _note(self, tokens: dict[str, int], begun: list[Sequence]) -> None:
        with self._lock:
            for digest, count in tokens.items():
                self._use(digest).tokens += count
            for sequence in begun:
                wait = sequence.begun - sequence.added
                self._queue.observe(wait)
                for adapter in sequence.request.adapters:
                    use = self._use(adapter.digest)
                    use.waits += 1
                    use.wait_seconds += wait

    def _use(self, digest: str) -> AdapterUse:
        if digest.startswith(TRIAL) or (digest not in self._uses and len(self._uses) >= MAX_USES):
            digest = ""
        return self._uses.setdefault(digest, AdapterUse())
