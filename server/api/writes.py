"""What a request changes, gathered while it runs, for the record of changes."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import Depends, Request
from starlette.types import Scope

from adapters_store.generators import GeneratorInfo
from adapters_store.info import AdapterInfo, AdapterRef
from server.api.dependencies import CALLER, Caller

WRITE = "polyrank.write"
MAX_NAME = 512


@dataclass(slots=True)
class Write:
    """name: what is to be changed, where it does not stand in the path; version, digest: what came of it; job: the id
    of one that will do it; key_id: of a key that was right once; noted: the line is written."""

    name: str | None = None
    version: int | None = None
    digest: str | None = None
    job: str | None = None
    key_id: str | None = None
    noted: bool = False

    def made(self, info: AdapterInfo | AdapterRef | GeneratorInfo) -> None:
        """The version that the request has made, or found to be there already, or acts on."""
        self.name, self.version, self.digest = info.name, info.version, info.digest


def write_line(scope: Scope, write: Write, status: int, request_id: str) -> dict[str, Any]:
    """One line of the record. Names are the client's own words and may be anything: cut here, escaped by JSON."""
    caller: Caller | None = scope.get(CALLER)
    in_path = next(iter(scope.get("path_params", {}).values()), None)
    name = write.name if write.name is not None else in_path
    route = getattr(scope.get("route"), "path", "unmatched")
    return {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": request_id,
        "key": caller.key_id if caller else write.key_id,
        "tenant": caller.tenant if caller else None,
        "action": f"{scope['method']} {route}",
        "name": str(name)[:MAX_NAME] if name is not None else None,
        "version": write.version,
        "digest": write.digest,
        "job": write.job,
        "status": status,
        "code": scope.get("polyrank.error_code"),
    }


async def get_write(request: Request) -> Write:
    write: Write = request.scope.setdefault(WRITE, Write())
    return write


WriteDep = Annotated[Write, Depends(get_write)]
