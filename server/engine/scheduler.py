"""Decides what each step computes. There is no prefill or decode phase: every running sequence's computed tokens
catch up with its tokens, within a budget per step. No tensors, so its tests run in milliseconds."""

from collections.abc import Iterator

from server.engine.adapter_pool import AdapterPool
from server.engine.batch import ScheduledBatch, ScheduledSequence
from server.engine.block_pool import BlockPool
from server.engine.fair_queue import FairQueue
from server.engine.sequence import Sequence
from server.engine.turns import crowding, interleaved, victim

MAX_OVERTAKES = 256  # admissions past a waiting sequence before admission waits for it
PATIENCE = 16  # steps for which whose turn it is waits for a place before another tenant or lane makes way


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
        self.waiting = FairQueue()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.add(sequence)
        for digest in sequence.digests:
            self.adapters.want(digest)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, finished or not, and free all it holds."""
        if sequence in self.running:
            self._vacate(sequence)
        elif sequence in self.waiting:
            self.waiting.take(sequence)
        self.waiting.forget(sequence)

    @property
    def awaited(self) -> frozenset[str]:
        """Adapters of the head of the queue: loaded first and not evicted, so that the head is always admitted."""
        head = self.waiting.head
        return frozenset(head.digests) if head is not None else frozenset()

    def schedule(self) -> ScheduledBatch:
        """Choose the next step: decodes first, then prompts, those of running and of waiting sequences by turns.

        Every entry has its KV blocks allocated. An empty batch means that nothing can run now: the queue is empty
        or waits for adapters.
        """
        self.blocks.now += 1
        if (claimant := self._claimant()) is not None and claimant.stalled >= PATIENCE:
            self._make_way(claimant)
        preempted = self.num_preemptions
        budget = self.token_budget
        decodes = [sequence for sequence in self.running if sequence.num_remaining == 1]
        prefills = [sequence for sequence in self.running if sequence.num_remaining > 1]
        entries: list[ScheduledSequence] = []
        for sequence in decodes if len(decodes) <= budget else interleaved(decodes, self.waiting.lane):
            if budget and (entry := self._go_on(sequence, budget)):
                entries.append(entry)
                budget -= entry.count
        prompts: list[ScheduledSequence] = []
        for entry in self._prompts(prefills, budget, admitting=preempted == self.num_preemptions):
            self.waiting.charge((entry,))
            prompts.append(entry)
        if preempted != self.num_preemptions:
            entries = [entry for entry in entries if entry.sequence.block_table]
        self.waiting.charge(entries)
        if claimant is not None and claimant in self.waiting:
            claimant.stalled += 1
        return ScheduledBatch((*entries, *prompts))

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

    def _claimant(self) -> Sequence | None:
        """Whose turn it is, if it lacks nothing but a place.

        A head that waits for its adapters remains the head: these are loaded first and kept, and with another head at
        every step two that need each other's room could evict each other for ever.
        """
        head = self.waiting.head
        if head is None:
            return None
        if self.adapters.all_resident(head.digests):
            self.waiting.choose_again()
            turn = self.waiting.head
        else:
            turn = self.waiting.least
        return turn if turn is not None and self.adapters.all_resident(turn.digests) else None

    def _make_way(self, claimant: Sequence) -> None:
        if (found := crowding(self.running, claimant, self.waiting.lane)) is not None:
            self._interrupt(found)
            self.waiting.put_back(found)

    def _go_on(self, sequence: Sequence, budget: int) -> ScheduledSequence | None:
        """Tokens of a running sequence; None if it has been preempted in this step, or is now."""
        count = min(sequence.num_remaining, budget)
        if not sequence.block_table or not self._extend(sequence, count):
            return None
        return ScheduledSequence(sequence, sequence.num_computed, count)

    def _prompts(self, prefills: list[Sequence], budget: int, *, admitting: bool) -> Iterator[ScheduledSequence]:
        """Deal the budget that decodes have left: to whose tenant and lane has had least, running or waiting.

        Each entry is to be charged before the next is asked for. A waiting sequence whose adapters are not there yet is
        passed over; one that was passed over too often no more: those that run drain, and leave room for its adapters.
        """
        rank = self.waiting.rank
        passed: list[Sequence] = []
        for sequence in self.waiting.in_turn() if admitting else ():
            while budget and prefills and rank(first := min(prefills, key=rank)) <= rank(sequence):
                prefills.remove(first)
                if entry := self._go_on(first, budget):
                    budget -= entry.count
                    yield entry
            if not budget or len(self.running) >= self.max_running:
                break
            if not self.adapters.acquire(sequence.digests):
                if sequence.overtaken >= MAX_OVERTAKES:
                    break
                passed.append(sequence)
                continue
            if not self._admit(sequence):
                self.adapters.release(sequence.digests)
                break
            for earlier in passed:
                earlier.overtaken += 1
            self._begin(sequence)
            count = min(sequence.num_remaining, budget)
            budget -= count
            yield ScheduledSequence(sequence, sequence.num_computed, count)
        for sequence in sorted(prefills, key=rank):
            if budget and (entry := self._go_on(sequence, budget)):
                budget -= entry.count
                yield entry

    def _extend(self, sequence: Sequence, count: int) -> bool:
        """Give a running sequence blocks for `count` more tokens, preempting others if need be."""
        missing = self._blocks_for(sequence.num_computed + count) - len(sequence.block_table)
        if missing <= 0:
            return True
        self.adapters.give_blocks(missing, self.awaited)
        while (fresh := self.blocks.allocate(missing)) is None:
            found = victim(self.running, self.waiting.lane)
            self._preempt(found)
            if found is sequence:
                return False
        sequence.block_table.extend(fresh)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Free a sequence and queue it first; its tokens are kept and will be recomputed."""
        self._interrupt(sequence)
        self.waiting.put_first(sequence)

    def _interrupt(self, sequence: Sequence) -> None:
        self._vacate(sequence)
        sequence.preemptions += 1
        sequence.stalled = 0
        self.num_preemptions += 1

    def _begin(self, sequence: Sequence) -> None:
        self.waiting.take(sequence)
        self.running.append(sequence)
        self.adapters.counters.hits += len(set(sequence.digests))

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
