"""The arithmetic of the roofline sheet, by hand."""

import pytest

from tests.bench.roofline import DEVICES, LLAMA, Device, Model, Step, base_step, mixed, report, with_adapters

SMALL = Model("small", 2, ((10, 20), (20, 10)), 1000)


def test_bytes_and_flops_of_a_small_model() -> None:
    assert base_step(SMALL, 3) == Step(bytes=2 * 1800, flops=2 * 1800 * 3)
    # 120 parameters per rank: two layers of (10 + 20) twice
    assert with_adapters(SMALL, [4, 8], 1) == Step(bytes=3600 + 120 * 12, flops=2 * 1800 * 2 + 2 * 120 * 12)
    assert with_adapters(SMALL, [4, 8], 2).bytes == 3600 + 2 * 120 * 12


def test_shapes_of_llama() -> None:
    assert LLAMA.per_rank == 2_621_440
    assert 2 * LLAMA.parameters == pytest.approx(15.01e9, rel=1e-3)  # 16.06 GB less the table of embeddings


def test_the_slower_of_memory_and_arithmetic_counts() -> None:
    device = Device("toy", bandwidth=10, flops=100)
    assert Step(bytes=50, flops=100).seconds(device) == 5
    assert Step(bytes=50, flops=1000).seconds(device) == 10


def test_ranks_are_those_of_the_workload() -> None:
    assert mixed(8) == [8, 16, 32, 64, 8, 16, 32, 64]


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_the_sheet_says_that_it_is_computed(device: Device) -> None:
    lines = report(LLAMA, device).splitlines()
    assert lines[0].endswith("computed from the data sheet, not measured")
    assert len(lines) == 2 + 4 * 4
    shares = [float(line.split()[-1].rstrip("%")) for line in lines[2:] if line.split()[0] == "32"]
    # 32 ranks add up to 960: 2.52 GB in int8, 5.03 in bfloat16, and 10.74 padded to 64, beside 15.01 of the base
    assert shares == pytest.approx([100, 85.6, 74.9, 58.3], abs=0.1)
