"""An upload on its way into the store: checked, tried out on the engine, stored with a report of both."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from adapters_store.errors import CodedError
from adapters_store.forms import AdapterWeights
from adapters_store.info import AdapterInfo, Notice, Probe
from adapters_store.registry import AdapterRegistry
from server import divergence
from server.engine.request import WeightedAdapter
from server.trials import Trials

PROBE_SECONDS = 10.0  # waiting for other uploads included
PROMPT = divergence.PROMPTS[0]  # 26 tokens of the default model
# Stored only where the name has lost the content between the check and the commit.
KNOWN = Notice("known_content", "The name held this content already when it was sent, so it was not tried again.")

log = logging.getLogger(__name__)


class Intake:
    """The one way in for uploads to a running server.

    served: an adapter as the engine will hold it.
    """

    def __init__(
        self,
        registry: AdapterRegistry,
        engine: divergence.Engine,
        trials: Trials,
        served: Callable[[AdapterWeights], AdapterWeights],
    ) -> None:
        self._registry = registry
        self._engine = engine
        self._trials = trials
        self._served = served
        self._turn = asyncio.Lock()  # one probe at a time: each holds two distributions per token

    async def add(
        self,
        name: str,
        config: bytes,
        weights: Path,
        *,
        tenant: str = "public",
        if_match: str | None = None,
        replace: bool = False,
    ) -> tuple[AdapterInfo, bool]:
        """As `AdapterRegistry.add`, whose refusals come before the probe, with a probe's findings in `proof`.

        Content that is current already is not tried again. No failure of the probe, and no want of time for it, loses
        the upload: the report says why there is none.
        """
        found = await asyncio.to_thread(
            self._registry.candidate, name, config, weights, tenant=tenant, if_match=if_match, replace=replace
        )
        tried = KNOWN if found.known else await self.tried(lambda: self._registry.weights(found), name, tenant)
        return await asyncio.to_thread(self._registry.store, found, found.proof(tried))

    async def tried(self, load: Callable[[], AdapterWeights], name: str, tenant: str) -> Probe | Notice:
        """What an adapter that is not stored yet changes, or why that is not known. load: its forms; blocking."""
        try:
            async with asyncio.timeout(PROBE_SECONDS), self._turn:
                weights = await asyncio.to_thread(lambda: self._served(load()))
                with self._trials.on_trial(self._engine, weights) as digest:
                    # Without its invocation, which this prompt lacks, it acts everywhere, and the probe says something.
                    virtual_tokens = 0 if weights.context is None else weights.context.num_tokens
                    tried = WeightedAdapter(digest, virtual_tokens=virtual_tokens)
                    return await divergence.change(self._engine, PROMPT, tried, tenant)
        except TimeoutError:
            return Notice("probe_timeout", f"The engine was too busy to try the adapter within {PROBE_SECONDS:g} s.")
        except CodedError as error:
            return Notice(error.code, error.message)
        except Exception as error:
            log.exception("probe_failed", extra={"adapter": name})
            return Notice("probe_failed", f"The probe failed ({type(error).__name__}); see the server's log.")
