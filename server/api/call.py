"""One call of a generation route: everything a route needs beside the body."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from server.api.adapter_choice import AdapterChooser, ChooserDep
from server.api.context import new_call_id
from server.api.dependencies import Caller, CallerDep, ServicesDep
from server.api.services import Engine, Services
from server.api.usage_limits import take_request


@dataclass(frozen=True, slots=True)
class Call:
    """`id` names the call to the engine and in the answer."""

    request: Request
    services: Services
    caller: Caller
    adapters: AdapterChooser
    id: str

    @property
    def engine(self) -> Engine:
        return self.services.engine


async def within_rate(request: Request, services: ServicesDep, caller: CallerDep) -> None:
    """Raises RateLimited, before anything is read."""
    await take_request(request, caller, services.replicas)


RateDep = Annotated[None, Depends(within_rate)]


async def get_call(
    request: Request, services: ServicesDep, caller: CallerDep, _rate: RateDep, chooser: ChooserDep
) -> Call:
    return Call(request, services, caller, chooser, new_call_id(request))


CallDep = Annotated[Call, Depends(get_call)]
