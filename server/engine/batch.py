"""What one step computes: plain values from the scheduler to the model runner."""

from dataclasses import dataclass

from server.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """Tokens `start .. start + count` of a sequence, computed in this step."""

    sequence: Sequence
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """True when the step reaches the last token, so that its logits choose the next one."""
        return self.start + self.count == len(self.sequence.tokens)


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """All sequences of a step, at most one entry each."""

    entries: tuple[ScheduledSequence, ...]
