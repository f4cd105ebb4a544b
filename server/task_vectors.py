"""Task vectors on the running engine: hidden states while a few tokens are generated, as ordinary requests."""

import secrets
from collections.abc import Sequence
from typing import Any

import torch

from adapters_store.errors import AdapterInvalid
from adapters_store.generation.conditions import task_vector
from adapters_store.generation.orders import NEW_TOKENS
from server.divergence import Engine
from server.engine.request import GenerationRequest, SamplingParams, WeightedAdapter
from server.errors import EngineFailure
from server.patience import finished, submitted


class TaskVectors:
    """One example at a time, and each prompt computed anew, so that where nobody else asks, equal examples give equal
    bits; beside others the last bits may differ."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def find(
        self,
        examples: Sequence[str],
        adapter: WeightedAdapter | None,
        tenant: str,
        *,
        patient: bool = False,
    ) -> torch.Tensor:
        """float32 [hidden size], as `generation.conditions.task_vector`; the answers are greedy.

        adapter: that acts, or None for the base; patient: wait where the engine takes no more requests. Raises
        AdapterInvalid `bad_condition` for numbers that are not finite, and what the engine says of a request:
        ContextTooLong, Overloaded, NotReady.
        """
        vector = task_vector([await self._calls(example, adapter, tenant, patient) for example in examples])
        if not bool(vector.isfinite().all()):
            text = "The hidden states of these examples are not finite numbers."
            raise AdapterInvalid(text, code="bad_condition", param="examples")
        return vector

    async def _calls(self, example: str, adapter: WeightedAdapter | None, tenant: str, patient: bool) -> torch.Tensor:
        """float32 [calls, hidden size]."""
        rows: dict[int, Any] = {}

        def keep(call: int, hidden: torch.Tensor) -> None:
            rows[call] = hidden.float().cpu().numpy().copy()

        params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0)
        adapters = () if adapter is None else (adapter,)
        request = GenerationRequest(
            f"vector-{secrets.token_hex(8)}", example, params, adapters, tenant, hidden_probe=keep
        )
        stream = await submitted(self._engine, request) if patient else await self._engine.submit(request)
        await finished(stream)
        if not rows:
            raise EngineFailure("An example ended before it was computed.")
        return torch.stack([torch.from_numpy(rows[call]) for call in sorted(rows)])
