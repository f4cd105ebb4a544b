"""The workload "distinct-8": adapters of ranks 8 to 64, prompts of about 85 tokens, all requests of a case at once.

Peers read this in environments of their own: standard library only.
"""

from dataclasses import dataclass

from tests.bench.peers.protocol import Request

RANKS = (8, 16, 32, 64)
NEW_TOKENS = 64
SENTENCE = "The history of the city begins with a small settlement on the river. "
LONG = 60  # sentences of a long prompt: about 840 tokens


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table: request i uses adapter `first` + i modulo `adapters`, or none if there are none."""

    adapters: int
    concurrency: int
    first: int = 0
    sentences: int = 6
    new_tokens: int = NEW_TOKENS

    @property
    def title(self) -> str:
        if not self.adapters:
            kind = "base"
        elif self.adapters == 1:
            kind = f"1 adapter of rank {RANKS[self.first % len(RANKS)]}"
        else:
            kind = f"{self.adapters} distinct"
        return f"{kind}, {self.concurrency} at once"

    def requests(self, run: int) -> list[Request]:
        """The run number at the head of each prompt keeps prefix caches out of the figures."""
        text = SENTENCE * self.sentences
        return [
            Request(f"{run} {index} {text}", self._adapter(index), self.new_tokens) for index in range(self.concurrency)
        ]

    def _adapter(self, index: int) -> str | None:
        return f"a{self.first + index % self.adapters}" if self.adapters else None


BASE_8, ONE_8, SAME_8, DISTINCT_8 = Case(0, 8), Case(1, 8), Case(1, 8, first=3), Case(8, 8)
CASES = (Case(0, 1), BASE_8, Case(0, 16), Case(1, 1), ONE_8, SAME_8, DISTINCT_8, Case(8, 16))
QUICK_CASES = (Case(0, 1), BASE_8, SAME_8, DISTINCT_8)
PREFILL = (Case(0, 1, sentences=LONG, new_tokens=1), Case(0, 4, sentences=LONG, new_tokens=1))
