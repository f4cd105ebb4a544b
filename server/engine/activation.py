"""Where in a sequence its adapters act, and the virtual tokens before it. Plain values, no torch."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from server.engine.request import WeightedAdapter
from server.errors import InvalidRequest

VIRTUAL = 0  # stands for a virtual token among token ids: every vocabulary has it, and what it means is never used
NEVER = sys.maxsize


@dataclass(frozen=True, slots=True)
class Activation:
    """An adapter of a sequence. start: position from which on it acts, virtual tokens counted; `NEVER` for nowhere."""

    adapter: WeightedAdapter
    start: int = 0


def num_virtual_tokens(adapters: Sequence[WeightedAdapter]) -> int:
    return sum(adapter.virtual_tokens for adapter in adapters)


def check_alone(adapters: Sequence[WeightedAdapter]) -> None:
    """Raises InvalidRequest `context_composed` unless an adapter of virtual tokens is the only one, and unweighted."""
    if num_virtual_tokens(adapters) and (len(adapters) > 1 or adapters[0].weight != 1):
        text = "An adapter that puts virtual tokens before the prompt acts alone: no other beside it, and weight 1."
        raise InvalidRequest(text, code="context_composed", param="adapters")


def activations(adapters: Sequence[WeightedAdapter], prompt: Sequence[int], num_virtual: int) -> tuple[Activation, ...]:
    """Of each adapter, in their order.

    One with an invocation acts from the first token of its last occurrence in the prompt on, that token and all
    generated ones included, and nowhere if it does not occur, as in PEFT's `calculate_alora_offsets` (arXiv
    2504.12397).
    """
    return tuple(Activation(adapter, _start(adapter.invocation, prompt, num_virtual)) for adapter in adapters)


def _start(invocation: tuple[int, ...], prompt: Sequence[int], num_virtual: int) -> int:
    if not invocation:
        return 0
    size = len(invocation)
    for index in range(len(prompt) - size, -1, -1):
        if prompt[index] == invocation[0] and tuple(prompt[index : index + size]) == invocation:
            return num_virtual + index
    return NEVER
