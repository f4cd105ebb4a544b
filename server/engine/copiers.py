"""How the bytes of an adapter reach the device: at once, or beside the model's steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]  # target and source, each uint8 [bytes]


class Arrival(Protocol):
    """Bytes on their way to the device."""

    def done(self) -> bool: ...
    def wait(self) -> None: ...


class Copier(Protocol):
    """Brings bytes to the device; None if they are there already."""

    def copy(self, pairs: Pairs) -> Arrival | None: ...


class DirectCopier:
    """Copies at once, where the host's memory is the device's."""

    def copy(self, pairs: Pairs) -> None:
        for target, source in pairs:
            target.copy_(source)


class SideStreamCopier:
    """Copies from pinned memory on a stream of its own, while the model's stream computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, pairs: Pairs) -> "CudaArrival":
        """pairs: targets on the GPU, sources in pinned memory."""
        # What an evicted adapter's last step still reads is not overwritten under it.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return CudaArrival(event, tuple(source for _, source in pairs))


@dataclass(frozen=True, slots=True)
class CudaArrival:
    """Copies that an event ends. sources: kept alive until then."""

    event: torch.cuda.Event
    sources: tuple[torch.Tensor, ...]

    def done(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        self.event.synchronize()
