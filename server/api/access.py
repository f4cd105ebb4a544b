"""What each route asks of its caller. A route says it once, as a dependency of its own or of its router."""

from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.routing import APIRoute, iter_route_contexts

from server.access.key import SCOPES, Scope
from server.api.dependencies import authorise
from server.api.writes import WRITE, Write
from server.errors import InvalidKey, MissingScope

_CHANGING: frozenset[Scope] = frozenset({"adapters:write", "admin"})


class Needs:
    """A dependency: the caller has one of the scopes, or `admin`, which includes them all. No scopes: open to all.

    Routes that only those may use who change something are noted for the record of changes, refused calls too.
    """

    def __init__(self, *scopes: Scope) -> None:
        self.scopes: frozenset[Scope] = frozenset(scopes)
        self.changes = bool(scopes) and self.scopes <= _CHANGING

    async def __call__(self, request: Request) -> None:
        """Raises MissingScope and what `authorise` raises."""
        if self.changes:
            request.scope.setdefault(WRITE, Write())
        if not self.scopes:
            return
        try:
            caller = await authorise(request)
        except InvalidKey as error:
            if (write := request.scope.get(WRITE)) is not None:
                write.key_id = error.key_id
            raise
        if not caller.scopes & (self.scopes | {"admin"}):
            wanted = " or ".join(f"`{scope}`" for scope in sorted(self.scopes))
            raise MissingScope(f"This API key may not do this: it lacks the scope {wanted}.")


OPEN = Depends(Needs())
ANY_KEY = Depends(Needs(*SCOPES))
GENERATE = Depends(Needs("generate"))
READ = Depends(Needs("adapters:read"))
CHANGE = Depends(Needs("adapters:write"))
ADMIN = Depends(Needs("admin"))
LIST = Depends(Needs("generate", "adapters:read"))  # clients for generation list the models first
READ_JOBS = Depends(Needs("adapters:read", "adapters:write"))
WATCH = Depends(Needs("metrics"))


def describe_keys(api: FastAPI) -> None:
    """Says in the schema how keys are sent, and which routes need none."""
    plain = api.openapi

    def openapi() -> dict[str, Any]:
        schema = plain()
        if "security" not in schema:
            bearer = {"type": "http", "scheme": "bearer"}
            header = {"type": "apiKey", "in": "header", "name": "X-API-Key"}
            schema["components"]["securitySchemes"] = {"key": bearer, "header": header}
            schema["security"] = [{"key": []}, {"header": []}]
            for context in iter_route_contexts(api.routes):
                route = context.original_route
                if isinstance(route, APIRoute) and route.include_in_schema and not needs_of(route).scopes:
                    for method in route.methods or ():
                        schema["paths"][context.path_format][method.lower()]["security"] = []
        return schema

    api.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to change the schema


def needs_of(route: APIRoute) -> Needs:
    """What a route has declared. Raises TypeError for one that declares nothing, or more than one thing."""
    found = [each.dependency for each in route.dependencies if isinstance(each.dependency, Needs)]
    if len(found) != 1:
        text = f"{sorted(route.methods or ())} {route.path} must declare once what it needs: see server.api.access"
        raise TypeError(text)
    return found[0]
