"""Plain torch meaning of what a module may have besides a low-rank part: the specification of those kernels.

Everywhere forms is int64 [slots, FORM_FIELDS], one module's column; pool: uint8 [bytes]; a slot without the form in
question leaves its rows alone, as do rows outside `segments`. Sums and rounding as in `kernels.reference`.
"""

from collections.abc import Callable

import torch

from kernels.reference import _segments, _wide
from kernels.reference import _slice as _bytes
from kernels.segments import FACTOR_DTYPES, ONE_BIT, FormField, Segments


def transform_input(x: torch.Tensor, pool: torch.Tensor, forms: torch.Tensor, segments: Segments) -> torch.Tensor:
    """`x[t] + sum w (R x[t] - x[t])` over the row's adapters, as a new tensor; R is block-diagonal, stored transposed.

    x: [T, in]. A row with one adapter of weight 1 becomes R x; one of weight w: `(1 - w) x + w R x`.
    Source: OFT (arXiv 2306.07280) eq. 1 with R on the input's side, as PEFT has it; IA3 (arXiv 2205.05638) on inputs.
    """
    total = x.to(_wide(x), copy=True)
    for slot, rows, weight in _segments(segments):
        form = forms[slot]
        if not (size := int(form[FormField.TRANSFORM_SIZE])):
            continue
        if x.shape[1] % size:
            raise ValueError(f"blocks of {size} do not fit {x.shape[1]} inputs")
        blocks = _floats(pool, form, FormField.TRANSFORM, x.shape[1] * size).view(-1, size, size)
        given = x[rows].to(total.dtype).view(len(rows), x.shape[1] // size, size)
        turned = torch.einsum("bji,tbj->tbi", blocks.to(total.dtype), given)
        total.index_add_(0, rows, weight[:, None] * (turned - given).flatten(1))
    return total.to(x.dtype)


def sparse_delta(
    y: torch.Tensor, x: torch.Tensor, pool: torch.Tensor, forms: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """Add sparse deltas in place: `y[t] += w * (S x[t])`; y: [T, out]; x: [T, in].

    Sources: SHiRA (arXiv 2406.13175), and what SpIEL (arXiv 2401.16405) trains.
    """

    def delta(form: torch.Tensor, rows: torch.Tensor, wide: torch.dtype) -> torch.Tensor | None:
        found = _sparse(pool, form, y.shape[1])
        if found is None:
            return None
        start, column, value = found
        row = torch.arange(y.shape[1], device=y.device).repeat_interleave(start.diff().long())
        own = torch.zeros(len(rows), y.shape[1], dtype=wide, device=y.device)
        for place, given in enumerate(x[rows].to(wide)):  # a row at a time: all of them would take T times S
            own[place].index_add_(0, row, given[column.long()] * value)
        return own

    return _added(y, forms, segments, delta)


def sparse_embedding(
    y: torch.Tensor, ids: torch.Tensor, pool: torch.Tensor, forms: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """Add sparse deltas of an embedding in place: `y[t] += w * S[ids[t]]`; y: [T, dim]; ids: int64 [T]."""

    def delta(form: torch.Tensor, rows: torch.Tensor, wide: torch.dtype) -> torch.Tensor | None:
        found = _sparse(pool, form, int(form[FormField.SPARSE_ROWS]))
        if found is None:
            return None
        start, column, value = found
        own = torch.zeros(len(rows), y.shape[1], dtype=wide, device=y.device)
        for place, token in enumerate(ids[rows].tolist()):
            first, last = int(start[token]), int(start[token + 1])
            own[place, column[first:last].long()] = value[first:last].to(wide)
        return own

    return _added(y, forms, segments, delta)


def dense_delta(
    y: torch.Tensor, x: torch.Tensor, pool: torch.Tensor, forms: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """Add deltas of full rank in place: `y[t] += w * (scale * (D x[t]))`; y: [T, out]; x: [T, in].

    Source: BitDelta (arXiv 2402.10193) eq. 1 where D is of signs.
    """

    def delta(form: torch.Tensor, rows: torch.Tensor, wide: torch.dtype) -> torch.Tensor | None:
        if not int(form[FormField.DENSE_ROWS]):
            return None
        _check_rows(form, FormField.DENSE_ROWS, y.shape[1])
        product = x[rows].to(wide) @ _dense(pool, form, y.shape[1], x.shape[1]).to(wide).T
        return product * _floats(pool, form, FormField.DENSE_SCALE, y.shape[1])

    return _added(y, forms, segments, delta)


def scale_output(y: torch.Tensor, pool: torch.Tensor, forms: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Scale outputs in place: `y[t] += sum w ((scale - 1) y0 + pair * partner(y0) + bias)`, y0 being y[t] on entry.

    y: [T, out]. partner(y)[i] is y[i + stride] in the first half of each group of `2 * stride` neighbours, else
    y[i - stride]. Sources: DoRA (arXiv 2402.09353) eq. 5, IA3 (arXiv 2205.05638), RoAd (arXiv 2409.00119) eq. 5.
    """
    outputs = y.shape[1]
    total = y.to(_wide(y), copy=True)
    given = total.clone()
    for slot, rows, weight in _segments(segments):
        form = forms[slot]
        if not (stride := int(form[FormField.SCALE_STRIDE])):
            continue
        own = torch.zeros(len(rows), outputs, dtype=total.dtype, device=y.device)
        if int(form[FormField.SCALE]) >= 0:
            own += (_floats(pool, form, FormField.SCALE, outputs).to(total.dtype) - 1) * given[rows]
        if int(form[FormField.SCALE_PAIR]) >= 0:
            if outputs % (2 * stride):
                raise ValueError(f"pairs {stride} apart do not fit {outputs} outputs")
            partner = given[rows].view(len(rows), outputs // (2 * stride), 2, stride).flip(2).flatten(1)
            own += _floats(pool, form, FormField.SCALE_PAIR, outputs) * partner
        if int(form[FormField.SCALE_BIAS]) >= 0:
            own += _floats(pool, form, FormField.SCALE_BIAS, outputs)
        total.index_add_(0, rows, weight[:, None] * own)
    return y.copy_(total)


Delta = Callable[[torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor | None]


def _added(y: torch.Tensor, forms: torch.Tensor, segments: Segments, delta: Delta) -> torch.Tensor:
    """`y[rows] += weight * delta(form, rows)`, rounded once; a row may stand in several segments."""
    total = y.to(_wide(y), copy=True)
    for slot, rows, weight in _segments(segments):
        own = delta(forms[slot], rows, total.dtype)
        if own is not None:
            total.index_add_(0, rows, weight[:, None] * own)
    return y.copy_(total)


def _sparse(
    pool: torch.Tensor, form: torch.Tensor, rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """start, column and value of S, or None."""
    if not int(form[FormField.SPARSE_ROWS]):
        return None
    _check_rows(form, FormField.SPARSE_ROWS, rows)
    count = int(form[FormField.SPARSE_COUNT])
    start = _slice(pool, form, FormField.SPARSE_START, 4 * (rows + 1)).view(torch.int32)
    column = _slice(pool, form, FormField.SPARSE_COLUMN, 4 * count).view(torch.int32)
    return start, column, _floats(pool, form, FormField.SPARSE_VALUE, count)


def _dense(pool: torch.Tensor, form: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    kind = int(form[FormField.DENSE_DTYPE])
    if kind == ONE_BIT:
        bits = _slice(pool, form, FormField.DENSE, outputs * -(-inputs // 8)).view(outputs, -1, 1)
        ones = (bits >> torch.arange(8, dtype=torch.uint8, device=pool.device)) & 1
        return ones.flatten(1)[:, :inputs].float() * 2 - 1
    if not 0 <= kind < len(FACTOR_DTYPES):
        raise ValueError(f"DENSE_DTYPE {kind} is unknown")
    dtype = FACTOR_DTYPES[kind]
    return _slice(pool, form, FormField.DENSE, outputs * inputs * dtype.itemsize).view(dtype).view(outputs, inputs)


def _check_rows(form: torch.Tensor, field: FormField, expected: int) -> None:
    if int(form[field]) != expected:
        raise ValueError(f"{field.name} is {int(form[field])}; y has {expected} columns")


def _floats(pool: torch.Tensor, form: torch.Tensor, field: FormField, count: int) -> torch.Tensor:
    return _slice(pool, form, field, 4 * count).view(torch.float32)


def _slice(pool: torch.Tensor, form: torch.Tensor, field: FormField, count: int) -> torch.Tensor:
    return _bytes(pool, field.name, int(form[field]), count)
