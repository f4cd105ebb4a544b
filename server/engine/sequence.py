"""A request inside the engine: its tokens, how far they are computed, and what it holds."""

from collections.abc import Iterable
from collections.abc import Sequence as TokenSequence

from server.engine.activation import VIRTUAL, activations, num_virtual_tokens
from server.engine.block_pool import PrefixKeys
from server.engine.request import TRIAL, Candidate, GenerationRequest

MAX_IDS = 16  # of requests in a line of the log


class Sequence:
    """Tokens of one request (an adapter's virtual ones, prompt, then output) and what it holds while it runs.

    `num_computed` tokens have their keys and values in `block_table`; a step computes some of the rest. The
    scheduler owns `num_computed`, `block_table` and the counts behind it; the engine core owns the output fields.
    Virtual tokens have places in `tokens` and in the cache like any other; nobody outside the engine sees them.
    `StepWatch` owns the times, monotonic and 0 before: when it came, its first step began, its first token was there.
    """

    def __init__(
        self, request: GenerationRequest, prompt: TokenSequence[int], max_tokens: int, fingerprint: str, block_size: int
    ) -> None:
        """fingerprint: of the base; block_size: of the KV cache, in tokens."""
        self.request = request
        self.digests = tuple(adapter.digest for adapter in request.adapters)
        self.num_virtual = num_virtual_tokens(request.adapters)
        self.tokens = [VIRTUAL] * self.num_virtual + list(prompt)
        self.num_prompt = len(self.tokens)  # virtual tokens counted
        self.activations = activations(request.adapters, prompt, self.num_virtual)
        self.max_tokens = max_tokens
        self.keys = PrefixKeys(fingerprint, self.activations, request.tenant, block_size)
        self.num_computed = 0
        self.num_cached = 0
        self.block_table: list[int] = []
        self.preemptions = 0
        self.overtaken = 0
        self.stalled = 0
        self.added = self.begun = self.answered = 0.0
        self.prompt_logprobs: dict[int, tuple[float, tuple[Candidate, ...]]] = {}

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_remaining(self) -> int:
        """Tokens not yet computed: 1 while decoding, more while the prompt is being prefilled."""
        return len(self.tokens) - self.num_computed

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def prompt(self) -> list[int]:
        """Without virtual tokens."""
        return self.tokens[self.num_virtual : self.num_prompt]

    @property
    def output(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.request.sampling.prompt_logprobs is not None

    @property
    def wants_prompt_logits(self) -> bool:
        """Whether the logits of every position of the prompt are asked for."""
        return self.wants_prompt_logprobs or self.request.probe is not None

    @property
    def computes_all(self) -> bool:
        """Whether every position must be computed, cached or not: hidden states are not to depend on who came before,
        by as much as a last bit."""
        return self.wants_prompt_logits or self.request.hidden_probe is not None


def ids_of(sequences: Iterable[Sequence]) -> list[str]:
    """For the log: each begins with the id of its HTTP request."""
    return [sequence.request_id for sequence in sequences][:MAX_IDS]


def digests_of(sequences: Iterable[Sequence]) -> tuple[str, ...]:
    """The adapters of these sequences that have a name: those on trial have none."""
    return tuple(sorted({d for s in sequences for d in s.digests if not d.startswith(TRIAL)}))
