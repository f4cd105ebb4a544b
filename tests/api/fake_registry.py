"""The registry's contract in memory: content is its hash, and any bytes will do."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

from adapters_store import names
from adapters_store.errors import AdapterConflict, AdapterInvalid, AdapterNotFound, CodedError, PreconditionFailed
from adapters_store.info import AdapterInfo, AdapterRef, BaseName, ModuleCount, Notice, RankRange
from adapters_store.lookup import public

Infos = list[AdapterInfo]  # inside the class, `list` is the method
CONFIG = b'{"peft_type": "LORA"}'


class FakeRegistry:
    """`failure` is raised by the next call that touches the disk; `seen_paths` says where uploads lay."""

    def __init__(self) -> None:
        self.names: dict[tuple[str, str], Infos] = {}
        self.near: dict[str, float] = {}  # share of a name's bytes on this machine's disk
        self.content: dict[str, tuple[bytes, bytes]] = {}
        self.failure: CodedError | None = None
        self.added: Infos = []
        self.seen_paths: list[Path] = []

    def put(self, name: str, weights: bytes = b"weights", tenant: str = "public") -> AdapterInfo:
        return self._store(name, CONFIG, weights + name.encode(), tenant)

    def tell(self, name: str, **facts: Any) -> AdapterInfo:
        """Change what is told of a name's current version."""
        versions = self.names["public", name]
        versions[-1] = changed(versions[-1], **facts)
        return versions[-1]

    def add(
        self,
        name: str,
        config: bytes,
        weights_path: Path,
        *,
        tenant: str = "public",
        if_match: str | None = None,
        replace: bool = False,
    ) -> tuple[AdapterInfo, bool]:
        self.seen_paths.append(weights_path)
        weights = weights_path.read_bytes()
        self._fail()
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name):
            raise AdapterInvalid(f"The adapter name `{name[:64]}` is bad.", code="bad_name", param="name")
        current = self.current(name, tenant)
        if current and current.digest == self.digest(config, weights):
            return current, False
        if if_match is not None:
            self._match(current, if_match)
        elif current and not replace:
            raise AdapterConflict(f"`{name}` holds other content.", param="name")
        return self._store(name, config, weights, tenant), True

    def resolve(self, reference: str, tenant: str = "public") -> AdapterRef:
        found = self._find(reference, tenant)
        acts = (found.knobs, found.virtual_tokens, found.invocation)
        return AdapterRef(found.name, found.version, found.digest, found.tenant, *acts)

    def info(self, reference: str, tenant: str = "public") -> AdapterInfo:
        return self._find(reference, tenant)

    def list(self, tenant: str = "public", cursor: str | None = None, limit: int = 100) -> tuple[Infos, str | None]:
        self._fail()
        seen: dict[str, AdapterInfo] = {}
        for owner in ("public", tenant):
            current = [self.current(name, whose) for whose, name in self.names if whose == owner]
            seen |= {info.name: info for info in current if info}
        infos = [seen[name] for name in sorted(seen) if name > (cursor or "")]
        return infos[:limit], infos[limit - 1].name if len(infos) > limit else None

    def versions(self, name: str, tenant: str = "public") -> Infos:
        for owner in (tenant, "public"):
            if (owner, name) in self.names:
                return self.names[owner, name][::-1]
        raise _missing(name)

    def delete(self, name: str, tenant: str = "public", if_match: str | None = None) -> None:
        names.require_name(name)
        self._fail()
        current = self.current(name, tenant)
        if current is None:
            raise public(name) if self.current(name) else _missing(name)
        if if_match is not None:
            self._match(current, if_match)
        gone = changed(current, version=current.version + 1, kind="deleted", digest="", event="delete")
        self.names[tenant, name].append(gone)

    def rollback(self, name: str, version: int, tenant: str = "public") -> AdapterInfo:
        old = self._find(f"{name}@{version}", tenant)
        if old.tenant != tenant:
            raise public(name)
        return self._store(name, *self.content[old.digest], tenant)

    def share_here(self, name: str, version: int, tenant: str = "public") -> float:
        return self.near.get(name, 0.0)

    def held(self, digest: str) -> bool:
        return any(versions[-1].digest == digest for versions in self.names.values())

    def open_file(self, reference: str, filename: str, tenant: str = "public") -> tuple[int, Iterator[bytes]]:
        config, weights = self.content[self._find(reference, tenant).digest]
        data = config if filename == "adapter_config.json" else weights
        return len(data), iter([data[:3], data[3:]])

    def current(self, name: str, tenant: str = "public") -> AdapterInfo | None:
        versions = self.names.get((tenant, name))
        return versions[-1] if versions and versions[-1].digest else None

    @staticmethod
    def digest(config: bytes, weights: bytes) -> str:
        return hashlib.sha256(config + b"|" + weights).hexdigest()

    def _store(self, name: str, config: bytes, weights: bytes, tenant: str) -> AdapterInfo:
        versions = self.names.setdefault((tenant, name), [])
        digest = self.digest(config, weights)
        info = AdapterInfo(
            name=name,
            version=len(versions) + 1,
            digest=digest,
            kind="lora",
            forms=("LowRank",),
            rank=RankRange(8, 8),
            modules=ModuleCount(2, 2),
            parameters=len(weights),
            bytes=len(weights),
            base=BaseName("acme/tiny-base", "f" * 64),
            created="2026-11-22T10:00:00.000+00:00",
            event="upload",
            provenance={"type": "upload"},
            compression=None,
            tenant=tenant,
            warnings=(Notice("adapter_is_noop", "All B are zero."),) if weights == b"zero" else (),
        )
        versions.append(info)
        self.content[digest] = (config, weights)
        self.added.append(info)
        return info

    def _find(self, reference: str, tenant: str) -> AdapterInfo:
        for prefix in ("base:", "acme/tiny-base:"):
            reference = reference.removeprefix(prefix)
        name, _, version = reference.partition("@")
        for owner in (tenant, "public"):
            for (whose, stored), versions in self.names.items():
                for info in reversed(versions):
                    live = stored == name and versions[-1].digest
                    wanted = live and (version == str(info.version) or (not version and info is versions[-1]))
                    if whose == owner and info.digest and (wanted or reference == f"sha256:{info.digest}"):
                        return info
        raise _missing(reference)

    def _match(self, current: AdapterInfo | None, if_match: str) -> None:
        if current is None or if_match not in ("*", current.digest):
            raise PreconditionFailed("If-Match does not name the current digest.", param="If-Match")

    def _fail(self) -> None:
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure


def _missing(reference: str) -> AdapterNotFound:
    return AdapterNotFound(f"The model `{reference[:128]}` does not exist.", param="model")
