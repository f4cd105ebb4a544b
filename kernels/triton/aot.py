"""Compile the kernels ahead of time for GPUs that need not be here, and write down what they take.

python -m kernels.triton.aot [--write] [--quick]

Registers, shared memory and spills are read from the machine code's own notes: `cuobjdump` for a cubin, the metadata
of the assembly for AMD. `--write` renews `RESOURCES.md`; `--quick` compiles one row of each kernel, as CI does.
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.segments import Field, Limits
from kernels.triton import launch
from kernels.triton.launch import Width

RESOURCES = Path(__file__).with_name("RESOURCES.md")
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}  # bytes per block
FACTORS = {"float32": 1, "bfloat16": 2, "int8": 8, "int4": 16, "floats": 7, "all": 31}
POINTERS = {
    "h": "*fp32", "scores": "*fp32", "weights": "*fp32", "pool": "*u8", "ids": "*i64", "gates": "*i64",
    "records": "*i64", "records0": "*i64", "records1": "*i64", "records2": "*i64",
    "table": "*i32", "slots": "*i32", "tokens": "*i32", "state": "*fp32", "sums": "*fp32", "query_start": "*i32",
    "kv_length": "*i32", "block_table": "*i32", "scale": "fp32", "softcap": "fp32", "eps": "fp32",
}  # fmt: skip
OWN_TYPES = {
    "lora_core": {"out": "*fp32"},
    "write_kv": {"slots": "*i64"},
    "paged_attention": {"tokens": "i32"},
    "paged_merge": {"tokens": "i32"},
}
HALF = {
    "x",
    "y",
    "y0",
    "y1",
    "y2",
    "query",
    "out",
    "key",
    "value",
    "key_pool",
    "value_pool",
    "delta",
    "total",
    "weight",
    "rows",
    "cos",
    "sin",
    "gate",
    "up",
}  # of the activations' type
# Sizes that are multiples of 16 in every real model.
ROUND = re.compile(
    r"inner|width|outer\d?|x_stride|y\d?_stride|count|size|"
    r"(query|head|page|place|kv_head|key|key_head|value|value_head|delta|row|cos|sin|gate|up)_stride"
)
MODULES = {"paged_merge": "paged_attention"} | dict.fromkeys(
    ("add_rms_norm", "rotate", "silu_mul"), "layer_parts"
)  # where the file is not named for the kernel


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel as one row of the launch table has it compiled."""

    kernel: str
    row: str
    activations: str  # type of x and y
    factors: str  # key of FACTORS
    constants: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Resources:
    """Per thread: registers (AMD: vector registers) and spilled bytes (AMD: spilled vector registers); per block: bytes
    of shared memory."""

    kernel: str
    row: str
    activations: str
    factors: str
    target: str
    registers: int
    shared: int
    spills: int


def variants(quick: bool = False) -> Iterator[Variant]:
    """Every row of the launch table with the factor types that its activations usually meet; some with all of them.

    `quick`: one row of each kernel.
    """
    yield from _of_adapters(quick)
    yield from _of_attention(quick)
    yield from _of_layers()


def _of_adapters(quick: bool) -> Iterator[Variant]:
    columns = {"A_COLUMN": int(Field.A), "RANK_COLUMN": int(Field.RANK), "DTYPE_COLUMN": int(Field.DTYPE)}
    for (half, width), row in launch.SHRINK.items():
        sizes = {"GROUP": 3, "PARTS": row.parts, "BLOCK_R": row.block_r, "BLOCK_K": row.block}
        yield from _with_types("lora_shrink", width, half, {**sizes, **columns}, row, quick)
    for (half, width), row in launch.EXPAND.items():
        blocks = {"GROUP": 3, "BLOCK_R": row.block_r, "BLOCK_N": row.block}
        for name, inner in (("lora_expand", Width.MEDIUM), ("lora_expand, fused", Width.NARROW)):
            shrink = launch.SHRINK[half, inner]
            fused = name.endswith("fused")
            parts = {"PARTS": shrink.parts if fused else 1, "BLOCK_K": shrink.block}  # else `lora_core` has summed them
            parts |= {"FUSED": fused, "CORES": not fused}
            yield from _with_types(name, width, half, {**blocks, **parts}, row, quick)
    for half, row in launch.REPLACE.items():
        sizes = {"BLOCK_R": row.block_r, "BLOCK_K": row.block}
        dtype = "bfloat16" if half else "float32"
        for factors in ("floats",) if quick else (dtype, "floats"):
            constants = {**sizes, "FACTORS": FACTORS[factors]}
            yield Variant("replace_weight", "any width", dtype, factors, constants, row.options)
    options, size = {**launch.OPTIONS, "num_stages": 2}, Limits().width
    yield Variant("lora_gate", f"width {size}", "float32", "float32", {"PARTS": 4, "WIDTH": size}, options)
    sizes = {"GROUP": 3, "PARTS": 4, "WIDTH": size}
    yield Variant("lora_core", f"width {size}", "float32", "float32", sizes, launch.OPTIONS)
    yield Variant("lora_gather", f"width {size}", "float32", "all", {"WIDTH": size}, options)


def _of_attention(quick: bool) -> Iterator[Variant]:
    """Four query heads to a KV head, pages of 16 tokens, the usual sizes of heads."""
    for dtype, dim in ((dtype, dim) for dtype in (torch.bfloat16, torch.float32) for dim in (64, 80, 128, 256)):
        if quick and (dtype, dim) != (torch.bfloat16, 128):
            continue
        row, activations = launch.attention_launch(4, dim, dtype, dtype), str(dtype).removeprefix("torch.")
        tile = {"PARTITION": launch.PARTITION, "GROUP": 4, "DIM": dim, "BLOCK_M": row.block_m, "BLOCK_D": row.block_d}
        for name, split in (("paged_attention", False), ("paged_attention, split", True)):
            own = {"CAPPED": True, "SPLIT": split, "PAGE": 16, "BLOCK_N": row.block_n}
            yield Variant(name, f"dim {dim}", activations, "none", {**tile, **own}, row.options(True))
        yield Variant("paged_merge", f"dim {dim}", activations, "none", tile, row.options(True))
    sizes = {"PAGE": 16, "DIM": 128, "BLOCK": launch.WRITE_BLOCK}
    yield Variant("write_kv", "dim 128", "bfloat16", "none", sizes, launch.OPTIONS)


def _of_layers() -> Iterator[Variant]:
    """The sizes of Llama-3.1-8B."""
    for name, row, constants, block in (
        ("add_rms_norm", "size 4096", {"ADD": True, "BLOCK": 4096}, 4096),
        ("rotate", "dim 128", {"NORM": True, "DIM": 128, "HALF": 64, "HEADS": launch.ROTATED // 64}, launch.ROTATED),
        ("silu_mul", "any size", {"BLOCK": launch.WRITE_BLOCK}, launch.WRITE_BLOCK),
    ):
        yield Variant(name, row, "bfloat16", "none", constants, launch.row_options(block))


def _with_types(
    kernel: str, width: Width, half: bool, constants: dict[str, Any], row: launch.Launch, quick: bool
) -> Iterator[Variant]:
    shrinks, fused = kernel == "lora_shrink", kernel.endswith("fused")
    types = ["bfloat16", "int8", "int4"] if half else ["float32"]
    if not fused:  # the fused kernel is not taken for several types
        types.append("floats")  # those that adapters are uploaded in
        types += ["all"] if width is (Width.MEDIUM if shrinks or not half else Width.NARROW) else []
    if quick:
        types = ["int8" if fused else "floats"] if half and width is Width.MEDIUM else []
    for factors in types:
        options = launch.expand_options(row, fused, FACTORS[factors], True)
        own = {"FACTORS": FACTORS[factors]}
        if shrinks:
            own["BLOCK_R"] = launch.shrink_ranks(row, FACTORS[factors])
            options = launch.shrink_options(row, FACTORS[factors])
        activations = "bfloat16" if half else "float32"
        yield Variant(kernel, str(width), activations, factors, {**constants, **own}, options)


def compile_variant(variant: Variant, target: str) -> Resources:
    """Raises triton's CompilationError where the kernel does not compile for the target."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name = variant.kernel.split(",")[0]
    function = getattr(importlib.import_module(f"kernels.triton.{MODULES.get(name, name)}"), name)
    types, half = {**POINTERS, **OWN_TYPES.get(name, {})}, {"bfloat16": "*bf16", "float32": "*fp32"}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(function.params):
        own = parameter.name
        if parameter.is_constexpr:
            signature[own], constants[(index,)] = "constexpr", variant.constants[own]
            continue
        signature[own] = types.get(own) or (half[variant.activations] if own in HALF else "i32")
        if signature[own].startswith("*") or ROUND.fullmatch(own):
            attributes[(index,)] = [["tt.divisibility", 16]]
    options = dict(variant.options)
    if target == "gfx942":
        options.pop("maxnreg", None)  # AMD's compiler knows no such bound
    source = ASTSource(function, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    registers, spills = _amd(compiled.asm["amdgcn"]) if target == "gfx942" else _nvidia(compiled.asm["cubin"])
    shared = int(compiled.metadata.shared)
    return Resources(
        variant.kernel, variant.row, variant.activations, variant.factors, target, registers, shared, spills
    )


def _nvidia(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of the stack: what is spilled lies there, and the kernels have nothing else to put there."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump says nothing of registers: {text}")
    return int(found[1]), int(found[2]) + int(found[3])


def _amd(assembly: str) -> tuple[int, int]:
    found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", assembly))
    return int(found["vgpr_count"]), int(found["vgpr_spill_count"]) + int(found["private_segment_fixed_size"])


def table(rows: list[Resources]) -> str:
    """`RESOURCES.md`."""
    import triton

    lines = [
        "# What the Triton kernels take",
        "",
        f"Written by `python -m kernels.triton.aot --write` with triton {triton.__version__}. Compiled ahead of time,",
        "run on an H100 alone. Registers per thread (gfx942: vector registers), shared memory in bytes per block,",
        "spills in bytes (gfx942: vector registers and bytes of scratch). Rows are those of `launch.py`; `factors` the",
        "types that the kernel was compiled for; `x, y` of attention: queries and pools.",
        "",
        "| kernel | row | x, y | factors | target | registers | shared | spills |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *("| " + " | ".join(map(str, asdict(row).values())) + " |" for row in rows), ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    rows = []
    for variant in variants(args.quick):
        for target in TARGETS:
            rows.append(compile_variant(variant, target))
            sys.stdout.write(json.dumps(asdict(rows[-1])) + "\n")
            sys.stdout.flush()
    if args.write:
        RESOURCES.write_text(table(rows))
    return any(row.spills or row.shared > SHARED_LIMIT[row.target] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
