"""Small JSON objects that live beside the log for a while: jobs that are not finished yet."""

import json
from typing import Any

from adapters_store import canonical
from adapters_store.bucket import ObjectMissing
from adapters_store.objects import Objects

_PREFIX = "jobs/"


class Notes:
    """Notes by id, in the store and as durable as it is. Blocking, thread-safe; ids are path segments of ours.

    Raises StorageFull or StoreUnavailable.
    """

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def put(self, note: str, fields: dict[str, Any]) -> None:
        """Writes a note, in place of the one that was there."""
        self._objects.publish({f"{_PREFIX}{note}.json": canonical.dump(fields)})

    def all(self) -> dict[str, dict[str, Any]]:
        """Every note that can be read; what is no JSON object, as after a crash of the disk, is left out."""
        found = {}
        for key in self._objects.sizes(_PREFIX):
            try:
                fields = json.loads(self._objects.get(key))
            except (ValueError, ObjectMissing):
                continue
            if isinstance(fields, dict):
                found[key.removeprefix(_PREFIX).removesuffix(".json")] = fields
        return found

    def remove(self, note: str) -> None:
        """Removes a note; nothing happens if there is none."""
        key = f"{_PREFIX}{note}.json"
        if seen := self._objects.listing(_PREFIX).get(key):
            self._objects.discard(key, seen)
