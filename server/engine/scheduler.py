"""Decides what each step computes. There is no prefill or decode phase: every running sequence's computed tokens
catch up with its tokens, within a budget per step. No tensors, so its tests run in milliseconds."""

from collections import deque
from collections.abc import Iterator

from server.engine.adapter_pool import AdapterPool
from server.engine.batch import ScheduledBatch, ScheduledSequence
from server.engine.block_pool import BlockPool
from server.engine.sequence import Sequence

MAX_OVERTAKES = 256  # admissions past a waiting sequence before admission waits for it
MAX_PREEMPTIONS = 3  # after these a sequence is preempted only if nothing else can be


class Scheduler:
    """Waiting and running sequences, and the KV blocks and adapters that the running ones hold.

    A sequence holds blocks and adapter references exactly while it is in `running`; `_admit` takes them and
    `_vacate` gives them back, whatever the reason (finish, abort, preemption).
    """

    def __init__(self, blocks: BlockPool, adapters: AdapterPool, *, token_budget: int, max_running: int) -> None:
        self.blocks = blocks
        self.adapters = adapters
        self.token_budget = token_budget
        self.max_running = max_running
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)
        for digest in sequence.digests:
            self.adapters.want(digest)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, finished or not, and free all it holds."""
        if sequence in self.running:
            self._vacate(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    @property
    def awaited(self) -> frozenset[str]:
        """Adapters of the head of the queue: loaded first and not evicted, so that the head is always admitted."""
        return frozenset(self.waiting[0].digests) if self.waiting else frozenset()

    def schedule(self) -> ScheduledBatch:
        """Choose the next step: running sequences first (decodes before prefills), then as many waiting as fit.

        Every entry has its KV blocks allocated. An empty batch means that nothing can run now: the queue is empty
        or waits for adapters.
        """
        self.blocks.now += 1
        entries: list[ScheduledSequence] = []
        budget = self.token_budget
        preempted = self.num_preemptions
        for sequence in sorted(self.running, key=lambda s: s.num_remaining > 1):
            count = min(sequence.num_remaining, budget)
            if count and sequence in self.running and self._extend(sequence, count):
                entries.append(ScheduledSequence(sequence, sequence.num_computed, count))
                budget -= count
        entries = [entry for entry in entries if entry.sequence in self.running]
        if preempted == self.num_preemptions:
            for sequence in self._admissible(budget):
                count = min(sequence.num_remaining, budget)
                entries.append(ScheduledSequence(sequence, sequence.num_computed, count))
                budget -= count
                if not budget:
                    break
        return ScheduledBatch(tuple(entries))

    def computed(self, entry: ScheduledSequence) -> None:
        """Record that a step has computed an entry's tokens; full blocks enter the prefix cache."""
        sequence = entry.sequence
        sequence.num_computed = entry.start + entry.count
        keys = sequence.keys.upto(sequence.tokens, sequence.num_computed)
        for index in range(entry.start // self.blocks.block_size, len(keys)):
            self.blocks.register(sequence.block_table[index], keys[index])

    def check_integrity(self) -> None:
        """Assert that blocks and adapters are held by the running sequences and by nobody else."""
        self.blocks.check_integrity([sequence.block_table for sequence in self.running])
        self.adapters.check_integrity([sequence.digests for sequence in self.running])
        if any(sequence.block_table or sequence.num_computed for sequence in self.waiting):
            raise AssertionError("a waiting sequence holds KV blocks")

    def _extend(self, sequence: Sequence, count: int) -> bool:
        """Give a running sequence blocks for `count` more tokens, preempting others if need be."""
        missing = self._blocks_for(sequence.num_computed + count) - len(sequence.block_table)
        if missing <= 0:
            return True
        self.adapters.give_blocks(missing, self.awaited)
        while (fresh := self.blocks.allocate(missing)) is None:
            victim = self._victim()
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.block_table.extend(fresh)
        return True

    def _victim(self) -> Sequence:
        """The newest running sequence, sparing those preempted often; the oldest always gets on."""
        spared = [s for s in self.running[1:] if s.preemptions < MAX_PREEMPTIONS]
        return spared[-1] if spared else self.running[-1]

    def _preempt(self, sequence: Sequence) -> None:
        """Free a sequence and queue it first; its tokens are kept and will be recomputed."""
        self._vacate(sequence)
        sequence.preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def _admissible(self, budget: int) -> Iterator[Sequence]:
        """Admit waiting sequences in order, passing over those whose adapters are not resident yet.

        A sequence passed over too often is passed no more: those that run drain, and leave room for its adapters.
        """
        for sequence in list(self.waiting):
            if budget <= 0 or len(self.running) >= self.max_running:
                return
            if not self.adapters.acquire(sequence.digests):
                if sequence.overtaken >= MAX_OVERTAKES:
                    return
                continue
            if not self._admit(sequence):
                self.adapters.release(sequence.digests)
                return
            for earlier in self.waiting:
                if earlier is sequence:
                    break
                earlier.overtaken += 1
            self.waiting.remove(sequence)
            self.running.append(sequence)
            self.adapters.counters.hits += len(set(sequence.digests))
            yield sequence
            budget -= min(sequence.num_remaining, budget)

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence its cached prefix and blocks for all its tokens, if they are free.

        Blocks for the whole sequence are taken at once: prompts admitted on a first chunk alone would preempt
        each other later. The last token is always computed, for its logits; all of them when the prompt's
        log probabilities or hidden states are asked for.
        """
        tokens = sequence.tokens
        reusable = 0 if sequence.computes_all else len(tokens) - 1
        cached = self.blocks.match(sequence.keys.upto(tokens, reusable))
        missing = self._blocks_for(len(tokens)) - len(cached)
        headroom = len(self.running)  # a block for each running sequence's next tokens
        spare = self.blocks.num_free_without(cached) - missing - headroom
        if spare + self.adapters.num_returnable(self.awaited) < 0:
            return False
        self.blocks.acquire(cached)
        self.adapters.give_blocks(missing + headroom, self.awaited)
        fresh = self.blocks.allocate(missing)
        if fresh is None:
            raise AssertionError("blocks were counted as free and are not")
        sequence.block_table = cached + fresh
        sequence.num_computed = len(cached) * self.blocks.block_size
        if not sequence.preemptions:
            sequence.num_cached = sequence.num_computed
            self.num_prefix_queries += len(tokens)
            self.num_prefix_hits += sequence.num_computed
        return True

    def _vacate(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.release(sequence.block_table)
        self.adapters.release(sequence.digests)
        sequence.block_table = []
        sequence.num_computed = 0

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.blocks.block_size)
