"""Decode steps as captured CUDA graphs: one for each padded number of rows, without adapters and with them.

Adapters come and go without a new capture, unless one is of a new kind (`AdapterTable.kinds`) or on a module that none
was on before: kernels read their records and factors at addresses that stay, and the graph with adapters launches them
for every module that is known to have some, where one without a part in the step returns at once. What a graph computes
is compared with the eager step once, right after its capture.
"""

import logging
from collections.abc import Callable, Iterable

import torch

from kernels.segments import Limits
from server.engine.decode_inputs import DecodeInputs, DecodeShape, DecodeStep
from server.model.base import BaseModel
from server.model.prepare import forward
from server.model.step_context import StepContext

Compute = Callable[[], torch.Tensor]
Capture = Callable[[Compute], Compute]
TOLERANCE = 0.01  # norm of a graph's logits against the eager ones: the base products may take another kernel

log = logging.getLogger(__name__)


def sizes(most: int) -> tuple[int, ...]:
    """1, 2, 4, ... and `most`: padding at most doubles a step, and there are few graphs to capture."""
    powers = [1 << i for i in range(most.bit_length()) if 1 << i < most]
    return (*powers, most)


class CudaCapture:
    """Makes a graph of what a function launches; the graphs share their memory, for one runs at a time.

    That memory is gone with the last of them: after it, a capture needs a new one of these.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Compute) -> Compute:
        graph = torch.cuda.CUDAGraph()
        # thread_local: threads that load adapters allocate pinned memory meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = compute()

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay


class DecodeGraphs:
    """Runs decode steps that a graph can take; the first step of each size runs eagerly on the graph's own buffers."""

    def __init__(
        self,
        base: BaseModel,
        context: StepContext,
        max_rows: int,
        shape: DecodeShape,
        captures: Callable[[], Capture],
    ) -> None:
        self._base = base
        self._context = context
        self._sizes = sizes(max_rows)
        self._shape = shape
        self._captures = captures  # gives what captures, for graphs that are dropped together
        self._capture = captures()
        # What the graphs were captured for: kinds of adapters, and the modules that these may be on.
        self._kinds: Limits | None = None
        self._modules: frozenset[int] = frozenset()
        self._inputs: dict[int, DecodeInputs] = {}
        self._replays: dict[tuple[int, bool], Compute | None] = {}  # None: has run once, not captured yet
        self._usable = True

    def run(self, step: DecodeStep, slots: Iterable[int]) -> torch.Tensor | None:
        """Logits of the step's rows, float32 [rows, vocabulary], until the next step; None: it must run eagerly.

        slots: the distinct adapter slots of the step.
        """
        size = self.size(len(step.tokens), step.entries)
        table = self._context.table
        assert table is not None
        if not self._usable or size is None or table.special(slots):
            return None  # more than low-rank deltas is rare, and would be a kind of graph of its own
        kinds = table.kinds(self._shape.rank)
        if (kinds, table.known) != (self._kinds, self._modules):
            self._inputs.clear()
            self._replays.clear()
            self._capture = self._captures()
            self._kinds, self._modules = kinds, table.known
        if size not in self._inputs:
            self._inputs[size] = DecodeInputs(size, self._shape, kinds, self._base.device)
        self._inputs[size].fill(step)
        logits = self._compute(size, step.segments is not None)
        return None if logits is None else logits[: len(step.tokens)]

    def size(self, rows: int, entries: int) -> int | None:
        """The smallest size that holds the rows and the entries."""
        return next((size for size in self._sizes if size >= max(rows, entries)), None)

    def _compute(self, size: int, with_adapters: bool) -> torch.Tensor | None:
        inputs, key = self._inputs[size], (size, with_adapters)
        replay = self._replays.get(key)
        if replay is not None:
            return replay()
        logits = self._eager(inputs, with_adapters)
        if key in self._replays:
            self._replays[key] = self._captured(inputs, with_adapters, logits)
        else:
            self._replays[key] = None
        return logits

    def _captured(self, inputs: DecodeInputs, with_adapters: bool, expected: torch.Tensor) -> Compute | None:
        """A graph that gives what was expected of the same inputs; without one, no graph is tried any more."""
        try:
            replay = self._capture(lambda: self._eager(inputs, with_adapters))
            difference, whole = ((replay() - expected).nan_to_num().norm(), expected.nan_to_num().norm())
            if bool(difference <= TOLERANCE * whole):
                return replay
            reason = f"a graph gives other logits (difference {float(difference / whole):.2g})"
        except Exception as error:  # a model whose code waits for the device, whatever that raises
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        self._usable = False
        log.warning("decode_not_captured", extra={"reason": reason, "note": "serving eagerly"})
        return None

    def _eager(self, inputs: DecodeInputs, with_adapters: bool) -> torch.Tensor:
        context = self._context
        segments = inputs.segments if with_adapters else None
        context.begin(inputs.attention, segments, segments)  # every row keeps its logits, so the head's are the same
        if with_adapters:
            context.active = self._modules
        context.compiled_step = None
        return forward(self._base, context, inputs.tokens, inputs.positions, inputs.logit_rows)
