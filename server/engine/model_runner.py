"""Runs a scheduled batch through the model: flat tensors in, chosen tokens out."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch

from kernels import dispatch
from kernels.segments import Segments
from server.engine.adapter_pool import AdapterPool
from server.engine.answer import Answer
from server.engine.batch import ScheduledBatch, ScheduledSequence
from server.engine.decode_graphs import DecodeGraphs
from server.engine.decode_inputs import DecodeStep
from server.engine.merged_base import MergedBase
from server.engine.sampler import Sampled, candidates, sample
from server.model.base import BaseModel
from server.model.decoder_layers import watch_last
from server.model.prepare import forward
from server.model.step_context import AttentionMetadata, StepContext
from server.model.virtual_tokens import VirtualRows


class _Rows(NamedTuple):  # made for every row of every step: a frozen dataclass takes twice the time
    """Flat rows of one entry: its first token row, and the part of the kept logits that is its own."""

    entry: ScheduledSequence
    first: int
    logits: range


class ModelRunner:
    """One forward pass per step. Rows of all requests lie flat, one after another, without padding."""

    def __init__(
        self,
        base: BaseModel,
        context: StepContext,
        adapters: AdapterPool,
        block_size: int,
        max_rank: int,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self.merged = MergedBase(base)
        self._base = base
        self._context = context
        self._adapters = adapters
        self._block_size = block_size
        self._rank = max_rank
        self._graphs = graphs

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch, answers: Mapping[str, Answer]) -> list[Sampled | None]:
        """Compute a batch; per entry the chosen token, or None if its prompt is not complete yet."""
        rows = _layout(batch)
        digests = {digest for entry in batch.entries for digest in entry.sequence.digests} - {self.merged.digest}
        slots = [self._adapters.slot(digest) for digest in digests]
        watched = [row for row in rows if row.entry.samples and row.entry.sequence.request.hidden_probe is not None]
        logits = None if watched else self._decode(batch, rows, slots)
        if logits is None:
            watching: AbstractContextManager[list[torch.Tensor]] = nullcontext([])
            with watch_last(self._base) if watched else watching as hidden:
                logits = self._forward(batch, rows, slots)
            _show_hidden(watched, hidden)
        for row in rows:
            _record_prompt_logprobs(row, logits)
            _show_prompt_logits(row, logits)
        sampling = [row for row in rows if row.entry.samples]
        if not sampling:
            return [None] * len(rows)
        last = [row.logits[-1] for row in sampling]
        chosen = iter(
            sample(
                logits if len(last) == len(logits) else logits[last],  # no copy in a step of decodes alone
                [answers[row.entry.sequence.request_id].sample_row() for row in sampling],
            )
        )
        return [next(chosen) if row.entry.samples else None for row in rows]

    def prepare(self, blocks: int) -> bool:
        """While nothing is to be computed: take memory for the KV cache, of which `blocks` blocks have been in use.

        A piece at a time; False: all is taken.
        """
        return self._context.cache is not None and self._context.cache.take_memory(blocks)

    def _decode(self, batch: ScheduledBatch, rows: list[_Rows], slots: list[int]) -> torch.Tensor | None:
        """Logits of a step of decodes alone, if a graph takes it."""
        if self._graphs is None or not all(e.count == 1 and e.samples for e in batch.entries):
            return None
        step = DecodeStep(
            tokens=[entry.sequence.tokens[entry.start] for entry in batch.entries],
            positions=[entry.start for entry in batch.entries],
            block_tables=[entry.sequence.block_table for entry in batch.entries],
            segments=self._segments([(row.entry, row.logits) for row in rows]),
        )
        return self._graphs.run(step, slots)

    def _forward(self, batch: ScheduledBatch, rows: list[_Rows], slots: list[int]) -> torch.Tensor:
        """Logits of the kept rows of any step."""
        self._context.begin(
            self._attention(batch),
            self._placed(self._segments([(row.entry, range(row.first, row.first + row.entry.count)) for row in rows])),
            self._placed(self._segments([(row.entry, row.logits) for row in rows])),
            slots,
            self._virtual(rows),
        )
        tokens = np.concatenate([np.asarray(e.sequence.tokens[e.start : e.start + e.count]) for e in batch.entries])
        positions = np.concatenate([np.arange(e.start, e.start + e.count) for e in batch.entries])
        return forward(
            self._base,
            self._context,
            self._tensor(tokens, torch.int64),
            self._tensor(positions, torch.int64),
            self._tensor([row.first + i for row in rows for i in _kept(row.entry)], torch.int64),
        )

    def _attention(self, batch: ScheduledBatch) -> AttentionMetadata:
        entries = batch.entries
        width = max(len(entry.sequence.block_table) for entry in entries)
        table = np.zeros((len(entries), width), dtype=np.int32)
        slots = []
        for index, entry in enumerate(entries):
            blocks = np.asarray(entry.sequence.block_table, dtype=np.int32)
            table[index, : len(blocks)] = blocks
            position = np.arange(entry.start, entry.start + entry.count)
            page = blocks[position // self._block_size].astype(np.int64)
            slots.append(page * self._block_size + position % self._block_size)
        return AttentionMetadata(
            query_start=self._tensor(np.cumsum([0, *(entry.count for entry in entries)]), torch.int32),
            kv_length=self._tensor([entry.start + entry.count for entry in entries], torch.int32),
            block_table=self._tensor(table, torch.int32),
            slots=self._tensor(np.concatenate(slots), torch.int64),
        )

    def _segments(self, rows: list[tuple[ScheduledSequence, range]]) -> Segments | None:
        """Rows grouped by adapter, in the order of digests, in host memory; None for a step of base rows alone.

        rows: of each entry its last ones, or all; those before the position from which on an adapter acts are not its.
        An adapter that is merged into the base is alone and has none.
        """
        groups: dict[str, list[tuple[range, float]]] = {}
        for entry, own in rows if self.merged.digest is None else ():
            end = entry.start + entry.count
            for activation in entry.sequence.activations:
                before = len(own) - max(0, end - activation.start)
                if acting := own[before:] if before > 0 else own:
                    adapter = activation.adapter
                    groups.setdefault(adapter.digest, []).append((acting, adapter.weight))
        if not groups:
            return None
        slots, starts, tokens, weights = list[int](), [0], list[int](), list[float]()
        for digest in sorted(groups):
            slots.append(self._adapters.slot(digest))
            for acting, weight in groups[digest]:
                tokens += acting
                weights += [weight] * len(acting)
            starts.append(len(tokens))
        return Segments(
            slot=torch.from_numpy(np.array(slots, dtype=np.int32)),  # half the time of `torch.tensor`
            start=torch.from_numpy(np.array(starts, dtype=np.int32)),
            token=torch.from_numpy(np.array(tokens, dtype=np.int32)),
            weight=torch.from_numpy(np.array(weights, dtype=np.float32)),
        )

    def _virtual(self, rows: list[_Rows]) -> list[VirtualRows]:
        """Rows that stand for virtual tokens. Raises RuntimeError where a request and its adapter disagree on them."""
        assert self._context.table is not None
        found = []
        for row in rows:
            sequence, start = row.entry.sequence, row.entry.start
            for adapter in sequence.request.adapters if start < sequence.num_prompt else ():
                place = self._context.table.context(self._adapters.slot(adapter.digest))
                if adapter.virtual_tokens != (0 if place is None else place.num_tokens):
                    raise RuntimeError("the request expects another number of virtual tokens than its adapter has")
                if place is not None and start < place.num_tokens:
                    count = min(row.entry.count, place.num_tokens - start)
                    found.append(VirtualRows(place, row.first, start, count))
        return found

    def _placed(self, segments: Segments | None) -> Segments | None:
        table = self._context.table
        if segments is None or table is None:
            return None
        return dispatch.place(segments, self._base.device, table.kinds(self._rank))

    def _tensor(self, values: object, dtype: torch.dtype) -> torch.Tensor:
        return torch.as_tensor(values, dtype=dtype).to(self._base.device, non_blocking=True)


def _layout(batch: ScheduledBatch) -> list[_Rows]:
    rows, first, logit = [], 0, 0
    for entry in batch.entries:
        count = len(_kept(entry))
        rows.append(_Rows(entry, first, range(logit, logit + count)))
        first += entry.count
        logit += count
    return rows


def _kept(entry: ScheduledSequence) -> range:
    """Rows of an entry (from its own first) whose logits are needed: the last one, or all of the prompt's."""
    if entry.start < entry.sequence.num_prompt and entry.sequence.wants_prompt_logits:
        return range(entry.count)
    return range(entry.count - 1, entry.count) if entry.samples else range(0)


def _record_prompt_logprobs(row: _Rows, logits: torch.Tensor) -> None:
    """Log probabilities of the prompt tokens that follow this entry's rows."""
    entry, sequence = row.entry, row.entry.sequence
    count = sequence.request.sampling.prompt_logprobs
    last = min(entry.start + entry.count, sequence.num_prompt - 1)
    if count is None or entry.start >= last:
        return
    for position in range(max(entry.start, sequence.num_virtual), last):
        logprobs = logits[row.logits[position - entry.start]].log_softmax(dim=-1)
        following = sequence.tokens[position + 1]
        sequence.prompt_logprobs[position + 1] = (float(logprobs[following]), candidates(logprobs, count))


def _show_prompt_logits(row: _Rows, logits: torch.Tensor) -> None:
    entry, sequence, probe = row.entry, row.entry.sequence, row.entry.sequence.request.probe
    if probe is not None:
        end = min(entry.start + entry.count, sequence.num_prompt)
        for position in range(max(entry.start, sequence.num_virtual), end):
            probe(position - sequence.num_virtual, logits[row.logits[position - entry.start]])


def _show_hidden(rows: list[_Rows], hidden: list[torch.Tensor]) -> None:
    """hidden: of the step's one forward pass, [T, hidden size]."""
    for row in rows:
        sequence, probe = row.entry.sequence, row.entry.sequence.request.hidden_probe
        if probe is not None:
            probe(sequence.num_output, hidden[0][row.first + row.entry.count - 1])
