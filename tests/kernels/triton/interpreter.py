"""Triton's interpreter, which runs a kernel on CPU tensors: the setting counts while triton is imported."""

import os
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

# Where there is a GPU the same tests run the compiled kernels there.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load_interpreted() -> None:
    """Import triton and our kernels for the interpreter, before anything else (transformers does) imports triton.

    The variable is taken back at once: processes that tests start, such as the one that compiles, shall not see it.
    """
    if DEVICE == "cuda" or find_spec("triton") is None:
        return
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    import kernels.triton.attention
    import kernels.triton.layer
    import kernels.triton.lowrank  # noqa: F401

    _teach_bfloat16()
    _patch_once()
    if before is None:
        del os.environ["TRITON_INTERPRET"]


def _teach_bfloat16() -> None:
    """The interpreter of 3.9 keeps bfloat16 as its bits, multiplies those in `tl.dot`, and cuts float32 off.

    Here `tl.dot` gets their values, and float32 is rounded to the nearest, ties to even, as a GPU does.
    """
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    handle: Any = interpreter.TensorHandle
    tl = interpreter.tl
    cast = builder.cast_impl

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if tl.bfloat16 not in (source.dtype.scalar, target.scalar) or source.dtype.scalar == target.scalar:
            return cast(self, source, target)
        if source.dtype.scalar == tl.bfloat16:
            return cast(self, handle(_values(source.data), tl.float32), target)
        return handle(_bits(source.data.astype(np.float32)), tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        left, right = (
            _values(side.data) if side.dtype.scalar == tl.bfloat16 else side.data.astype(np.float32) for side in (a, b)
        )
        product = (left[:, None, :] @ right)[:, 0]  # each row by itself, as on a GPU: BLAS blocks rows together
        return handle(product + d.data, d.dtype.scalar)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot


def _patch_once() -> None:
    """Let the interpreter's `triton.language` stay in place, and do without its checks of every index for overflow.

    Those two take most of the time; no index of a test comes near 2**31.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)

    patch, done = interpreter._patch_lang, set[int]()
    nothing = interpreter._LangPatchScope()

    def patch_lang(function: Any) -> Any:
        if id(function.__globals__) not in done:
            done.add(id(function.__globals__))
            patch(function)
        return nothing

    interpreter._patch_lang = patch_lang


def _values(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _bits(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)
