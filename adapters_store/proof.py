"""The proof of an upload as a record keeps it, and what an uploader should be told of it.

It stands in the record of a version and not in the manifest: what one server measured at one time is no part of the
content, and equal files must keep one digest.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from adapters_store.info import BaseCheck, ModuleCount, Notice, Probe, Proof

NOOP = "adapter_is_noop"
# Largest change, in nats, that is taken for none. On the default model in float32 an adapter of zeros reads 0, a
# millionth of the sentiment adapter 3e-5, which is rounding, and the example adapters 3 to 18. Where the base rounds
# more (int8, 16 bits) a tiny adapter may move its roundings, and no warning is given.
NOTICEABLE = 1e-3


def encode(proof: Proof | None) -> dict[str, Any] | None:
    return None if proof is None else asdict(proof)


def decode(fields: Mapping[str, Any] | None) -> Proof | None:
    """Raises KeyError or TypeError for what `encode` has not made."""
    if fields is None:
        return None
    probe, reason = fields["probe"], fields["reason"]
    return Proof(
        ModuleCount(**fields["modules"]),
        BaseCheck(**fields["base"]),
        None if probe is None else Probe(**probe),
        None if reason is None else Notice(**reason),
    )


def notices(proof: Proof | None, told: Iterable[Notice]) -> tuple[Notice, ...]:
    """What the proof adds to what is told already."""
    if proof is None or proof.probe is None or proof.probe.max_change > NOTICEABLE:
        return ()
    if any(notice.code == NOOP for notice in told):
        return ()
    text = f"Over a probe of {proof.probe.tokens} tokens no log probability changes by more than {NOTICEABLE:g} nats."
    return (Notice(NOOP, f"{text} Is the adapter trained?"),)
