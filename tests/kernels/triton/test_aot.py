"""The kernels compile for GPUs that are not here, within their shared memory and without spills."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version

import pytest

from kernels.triton import aot
from tests.contract.sources import ROOT


def compiled(*arguments: str) -> list[dict[str, object]]:
    """In a process of its own: this one has the interpreter's triton."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.triton.aot", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def check(rows: list[dict[str, object]], variants: list[aot.Variant]) -> None:
    assert len(rows) == len(variants) * len(aot.TARGETS)
    recorded = aot.RESOURCES.read_text()
    same_compiler = f"with triton {version('triton')}." in recorded  # another one may allot other registers
    for row in rows:
        assert row["spills"] == 0, row
        assert int(str(row["shared"])) <= aot.SHARED_LIMIT[str(row["target"])], row
        line = "| " + " | ".join(map(str, row.values())) + " |\n"
        assert not same_compiler or line in recorded, "python -m kernels.triton.aot --write"


def test_one_row_of_each_kernel_compiles_for_every_target() -> None:
    variants = list(aot.variants(quick=True))
    assert {v.kernel for v in variants} == {v.kernel for v in aot.variants()}
    check(compiled("--quick"), variants)


@pytest.mark.deep
def test_every_row_compiles_for_every_target() -> None:
    check(compiled(), list(aot.variants()))


def test_the_table_names_every_row_and_no_other() -> None:
    lines = [
        re.split(r" *\| *", line)[1:9]
        for line in aot.RESOURCES.read_text().splitlines()
        if re.match(r"\| (lora|replace|paged|write|add|rotate|silu)", line)
    ]
    expected = [
        [variant.kernel, variant.row, variant.activations, variant.factors, target]
        for variant in aot.variants()
        for target in aot.TARGETS
    ]
    assert [line[:5] for line in lines] == expected
    assert {line[7] for line in lines} == {"0"}, "spills"
    assert all(0 < int(line[5]) <= (512 if line[4] == "gfx942" else 255) for line in lines)


def test_a_spill_fails_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def spilling(variant: aot.Variant, target: str) -> aot.Resources:
        spills = 8 if (variant.kernel, target) == ("lora_expand", "sm_90") else 0
        return aot.Resources(variant.kernel, variant.row, "", "", target, 64, 1024, spills)

    monkeypatch.setattr(aot, "compile_variant", spilling)
    monkeypatch.setattr(sys, "argv", ["aot", "--quick"])
    assert aot.main() == 1
    assert '"spills": 8' in capsys.readouterr().out
