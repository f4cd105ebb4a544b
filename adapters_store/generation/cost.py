"""What making one adapter costs, known from a generator's settings before any tensor is: a file of some kilobytes can
ask for hours and gigabytes. Python's whole numbers do not overflow, however large the sizes that a header tells."""

from adapters_store.errors import AdapterInvalid
from adapters_store.generation.icm import KERNEL, PIECE, IcmSettings

MAX_CALLS = 256  # of the decoder for one adapter
MIN_GROUP = 4096  # numbers of a piece, where there are several
MAX_MULTIPLY_ADDS = 6 * 10**11  # the default settings take 2.3e10 for 1.93 million numbers, 5.0e11 for 42 million
MAX_DECODE_BYTES = 5 << 28  # the default settings take 1 GiB and 16 MiB for a whole group
_FLOAT64 = 8


def check_cost(settings: IcmSettings, numbers: int, condition: int, param: str | None = None) -> None:
    """Bounds one expansion: at most `MAX_CALLS` calls of the decoder, none for less than `MIN_GROUP` numbers unless it
    makes them all, `MAX_MULTIPLY_ADDS` in all calls, and `MAX_DECODE_BYTES` of memory in one.

    numbers: of an adapter; condition: numbers of one; param: that an error names. Allocates nothing. Raises
    AdapterInvalid `generator_too_large`.
    """
    pieces = settings.pieces(numbers)
    if pieces > MAX_CALLS:
        raise _too_large(f"{pieces} pieces of an adapter", f"{MAX_CALLS}; raise `group`", param)
    if pieces > 1 and settings.group < MIN_GROUP:
        text = f"An adapter of {numbers} numbers is cut into groups of {settings.group}; the least is {MIN_GROUP}."
        raise AdapterInvalid(text, code="generator_too_large", param=param)
    work = multiply_adds(settings, numbers, condition)
    if work > MAX_MULTIPLY_ADDS:
        found = f"{work:.2e} multiply-adds of an adapter"
        raise _too_large(found, f"{MAX_MULTIPLY_ADDS:.2e}; lower `channels` or `latent`", param)
    size = decode_bytes(settings, numbers)
    if size > MAX_DECODE_BYTES:
        found = f"{size >> 20} MiB of memory to make a piece"
        raise _too_large(found, f"{MAX_DECODE_BYTES >> 20} MiB; lower `channels` or `group`", param)


def multiply_adds(settings: IcmSettings, numbers: int, condition: int) -> int:
    """Of the decoder's linear map and convolutions, over all pieces of an adapter."""
    pieces, length = settings.pieces(numbers), settings.length(numbers)
    told = settings.latent + condition + (PIECE if pieces > 1 else 0)
    linear = told * settings.channels[-1] * (length >> len(settings.channels))
    stages = sum(KERNEL * inputs * outputs * size for inputs, outputs, size in _stages(settings, length))
    return pieces * (linear + stages + KERNEL * settings.channels[0] * length)


def decode_bytes(settings: IcmSettings, numbers: int) -> int:
    """Most that one call of the decoder holds at once in float64, without the weights: what a convolution takes and
    gives, and the columns that torch unfolds for it, of `KERNEL` numbers for each."""
    length = settings.length(numbers)
    last = (1 + KERNEL) * settings.channels[0] * length + length
    stages = (
        inputs * size + outputs * (KERNEL + 2) * size  # twice as many numbers come out as went in
        for inputs, outputs, size in _stages(settings, length)
    )
    return _FLOAT64 * max(last, *stages)


def _stages(settings: IcmSettings, length: int) -> list[tuple[int, int, int]]:
    """Channels in and out of each transposed convolution, and how many numbers each channel in has."""
    outputs = (settings.channels[0], *settings.channels)
    return [(wide, outputs[stage], length >> stage + 1) for stage, wide in enumerate(settings.channels)]


def _too_large(found: str, limit: str, param: str | None) -> AdapterInvalid:
    return AdapterInvalid(
        f"The generator takes {found}; the limit is {limit}.", code="generator_too_large", param=param
    )
