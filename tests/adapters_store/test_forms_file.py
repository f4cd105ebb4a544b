"""Forms in a file of their own: nothing lost, equal bytes for equal forms, and nothing taken that does not fit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from adapters_store.compression import int4
from adapters_store.errors import AdapterInvalid
from adapters_store.formats import forms_file
from adapters_store.forms import (
    BaseSpec,
    Dense,
    Form,
    GatedLowRank,
    InputTransform,
    Int4LowRank,
    LowRank,
    ModuleSpec,
    OutputScale,
    ReplacedWeight,
    SharedBasis,
    SignRows,
    Sparse,
)
from adapters_store.limits import Limits
from tests.adapters_store.support import BASE, NARROW, VOCABULARY, WIDTH

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
K, OUT = "model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.q_proj"
NAMES = (forms_file.FORMS_FILE, forms_file.BASIS_FILE)


def ints(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(sum(shape)))


def four_bits(rank: int, outputs: int) -> Int4LowRank:
    generator = torch.Generator().manual_seed(rank)
    a, b = torch.randn(rank, WIDTH, generator=generator), torch.randn(outputs, rank, generator=generator)
    return int4.quantized(LowRank(a, b, torch.ones(rank), torch.ones(outputs)))[0]


def shared(core: torch.Tensor, bias: torch.Tensor | None = None) -> SharedBasis:
    generator = torch.Generator().manual_seed(7)
    u, v = torch.randn(WIDTH, 3, generator=generator), torch.randn(3, WIDTH, generator=generator)
    return SharedBasis(u.bfloat16(), v.bfloat16(), core, bias)


def forms() -> dict[str, tuple[Form, ...]]:
    return {
        Q: (LowRank(ints(3, WIDTH), ints(WIDTH, 3), torch.rand(3)),),
        V: (LowRank(torch.randn(2, WIDTH).half(), torch.randn(NARROW, 2).half(), torch.rand(2), torch.rand(NARROW)),),
        "lm_head": (ReplacedWeight(torch.randn(VOCABULARY, WIDTH).bfloat16(), torch.rand(VOCABULARY)),),
        "model.embed_tokens": (LowRank(ints(1, VOCABULARY), ints(WIDTH, 1), torch.rand(1)),),
        K: (four_bits(4, NARROW),),
        OUT: (shared(torch.randn(3, 3), torch.rand(WIDTH)),),
    }


def sparse(rows: int, columns: int) -> Sparse:
    numbers = torch.randn(rows, columns) * (torch.rand(rows, columns) < 0.4)
    found = numbers != 0
    start = torch.cat([torch.zeros(1), found.sum(dim=1).cumsum(0)]).int()
    return Sparse(start, found.nonzero()[:, 1].int(), numbers[found])


NORM = "model.norm"
WITH_NORM = replace(BASE, norms={NORM: WIDTH})


def other_forms() -> dict[str, tuple[Form, ...]]:
    factors = torch.randn(4, WIDTH), torch.randn(WIDTH, 4), torch.rand(4)
    signs = SignRows(torch.randint(0, 256, (NARROW, -(-WIDTH // 8)), dtype=torch.uint8), WIDTH)
    return {
        Q: (
            GatedLowRank(*factors, torch.randn(2, WIDTH).half(), torch.rand(4), 3, torch.rand(WIDTH)),
            sparse(WIDTH, WIDTH),
            Dense(torch.randn(WIDTH, WIDTH).bfloat16(), torch.rand(WIDTH)),
            InputTransform(torch.randn(WIDTH // 4, 4, 4)),
            OutputScale(torch.rand(WIDTH), torch.rand(WIDTH), torch.rand(WIDTH), 2),
        ),
        V: (Dense(signs, torch.rand(NARROW)), OutputScale(bias=torch.rand(NARROW))),
        "model.embed_tokens": (sparse(VOCABULARY, WIDTH), OutputScale(torch.rand(WIDTH))),
        NORM: (OutputScale(torch.rand(WIDTH)),),
    }


def load(files: dict[str, bytes], tmp_path: Path) -> dict[str, tuple[Form, ...]]:
    paths = {name: tmp_path / name for name in files}
    for name, data in files.items():
        paths[name].write_bytes(data)
    return forms_file.load(paths, WITH_NORM, Limits())


@pytest.mark.parametrize("made", [forms(), other_forms()], ids=["low rank", "others"])
def test_nothing_is_lost(made: dict[str, tuple[Form, ...]], tmp_path: Path) -> None:
    found = load(forms_file.dump(made), tmp_path)
    assert found.keys() == made.keys()
    for name, given in made.items():
        for form, other in zip(given, found[name], strict=True):
            assert type(form) is type(other)
            parts, again = forms_file._parts(form), forms_file._parts(other)
            assert parts.keys() == again.keys()
            for part, tensor in parts.items():
                assert (again[part].dtype, again[part].is_contiguous()) == (tensor.dtype, True)
                assert torch.equal(again[part], tensor)


def test_an_empty_sparse_delta_stays_one(tmp_path: Path) -> None:
    start = torch.zeros(WIDTH + 1, dtype=torch.int32)
    made = {Q: (Sparse(start, torch.zeros(0, dtype=torch.int32), torch.zeros(0)),)}
    [form] = load(forms_file.dump(made), tmp_path)[Q]
    assert isinstance(form, Sparse)
    assert torch.equal(form.start, start)
    assert (len(form.column), len(form.value)) == (0, 0)


def test_equal_forms_give_equal_bytes() -> None:
    made = forms()
    assert forms_file.dump(made) == forms_file.dump(dict(reversed(made.items())))


def test_a_basis_is_one_file_for_all_who_share_it() -> None:
    one, other = ({OUT: (shared(core),)} for core in (torch.ones(3), torch.ones(3, 3)))
    files, others = forms_file.dump(one), forms_file.dump(other)
    assert tuple(files) == tuple(others) == NAMES
    assert files[NAMES[1]] == others[NAMES[1]]
    assert files[NAMES[0]] != others[NAMES[0]]
    assert OUT.encode() + b".core" in files[NAMES[0]]
    assert len(files[NAMES[1]]) > len(files[NAMES[0]]) > 0
    assert tuple(forms_file.dump({K: (four_bits(4, NARROW),)})) == NAMES[:1]


def test_facts() -> None:
    made = forms()
    lowrank = 3 * 2 * WIDTH + 2 * (WIDTH + NARROW) + NARROW + VOCABULARY + WIDTH + 4 * (WIDTH + NARROW) + NARROW
    assert forms_file.facts(made) == {
        "forms": ["low_rank", "shared_basis", "replaced_weight"],
        "rank": {"min": 1, "max": 4},
        "parameters": lowrank + 3 * 3 + WIDTH + VOCABULARY * (WIDTH + 1),
    }
    assert forms_file.facts({"lm_head": made["lm_head"]})["rank"] == {"min": 0, "max": 0}


def test_facts_of_other_forms() -> None:
    made = other_forms()
    numbers = sum(len(form.value) for found in made.values() for form in found if isinstance(form, Sparse))
    numbers += 4 * 2 * WIDTH + 2 * WIDTH + 4 + WIDTH  # factors, router, its bias, bias
    numbers += WIDTH * WIDTH + WIDTH + NARROW * WIDTH + NARROW  # dense, and of signs
    numbers += 4 * WIDTH + 3 * WIDTH + NARROW + WIDTH + WIDTH  # blocks, scales
    assert forms_file.facts(made) == {
        "forms": ["gated_low_rank", "sparse", "dense", "input_transform", "output_scale"],
        "rank": {"min": 4, "max": 4},
        "parameters": numbers,
    }


FITTING = {f"{Q}.a": ints(2, WIDTH), f"{Q}.b": ints(WIDTH, 2), f"{Q}.d": torch.rand(2)}
FITTING |= {f"{K}.{part}": tensor for part, tensor in forms_file._parts(four_bits(4, NARROW)).items()}
FITTING |= {f"{OUT}.{part}": tensor for part, tensor in forms_file._parts(shared(torch.rand(3))).items()}
BYTES = torch.zeros(4, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    "change",
    [
        {f"{Q}.a": ints(2, WIDTH + 1)},
        {f"{Q}.b": ints(WIDTH, 3)},
        {f"{Q}.b": torch.rand(WIDTH, 2)},
        {f"{Q}.d": torch.rand(3)},
        {f"{Q}.d": ints(2)},
        {f"{Q}.d": None},
        {f"{Q}.bias": torch.rand(WIDTH).half()},
        {f"{Q}.other": torch.rand(1)},
        {f"{Q}.weight_bias": torch.rand(WIDTH)},
        {"unknown.a": ints(2, WIDTH)},
        {"lm_head.weight": ints(VOCABULARY, WIDTH)},
        {"lm_head.weight": torch.rand(WIDTH, VOCABULARY)},
        {f"{Q}.a": ints(2, WIDTH).view(torch.uint8), f"{Q}.b": ints(WIDTH, 2).view(torch.uint8)},
        {f"{K}.a4": BYTES},
        {f"{K}.b4_scales": BYTES},
        {f"{K}.a4_scales": torch.ones(4, 1)},
        {f"{K}.b4": None},
        {f"{K}.d": torch.rand(5)},
        {f"{OUT}.core": torch.rand(3, 2)},
        {f"{OUT}.core": torch.rand(3).half()},
        {f"{OUT}.u": None},
        {f"{OUT}.v": torch.rand(3, WIDTH)},
        {f"{OUT}.u": ints(WIDTH, 3), f"{OUT}.v": ints(3, WIDTH)},
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, change: dict[str, torch.Tensor | None]) -> None:
    assert load({NAMES[0]: save(FITTING)}, tmp_path).keys() == {Q, K, OUT}
    tensors = {name: tensor for name, tensor in {**FITTING, **change}.items() if tensor is not None}
    with pytest.raises(AdapterInvalid) as caught:
        load({NAMES[0]: save(tensors)}, tmp_path)
    assert caught.value.code == "shape_mismatch"


OTHERS = {
    f"{name}.{part}": tensor
    for name, found in other_forms().items()
    for form in found
    for part, tensor in forms_file._parts(form).items()
}
START, COLUMN = OTHERS[f"{Q}.sparse_start"], OTHERS[f"{Q}.sparse_column"]


@pytest.mark.parametrize(
    "change",
    [
        {f"{Q}.router": torch.rand(3, WIDTH)},
        {f"{Q}.router": torch.rand(2, WIDTH + 1)},
        {f"{Q}.router": ints(2, WIDTH)},
        {f"{Q}.router": None},
        {f"{Q}.router_bias": torch.rand(2)},
        {f"{Q}.active": torch.tensor([5])},
        {f"{Q}.active": torch.tensor([0])},
        {f"{Q}.active": torch.tensor([1, 2])},
        {f"{Q}.active": None},
        {f"{Q}.sparse_start": START[:-1]},
        {f"{Q}.sparse_start": START.flip(0)},
        {f"{Q}.sparse_start": START + 1},
        {f"{Q}.sparse_start": START.long()},
        {f"{Q}.sparse_column": COLUMN.flip(0)},
        {f"{Q}.sparse_column": COLUMN + WIDTH},
        {f"{Q}.sparse_column": COLUMN - WIDTH},
        {f"{Q}.sparse_column": COLUMN[:-1]},
        {f"{Q}.sparse_column": COLUMN.long()},
        {f"{Q}.sparse_value": torch.full((len(COLUMN),), torch.nan)},
        {f"{Q}.sparse_value": torch.rand(len(COLUMN) + 1)},
        {f"{Q}.sparse_value": None},
        {f"{Q}.dense": torch.rand(WIDTH, WIDTH + 1)},
        {f"{Q}.dense": torch.full((WIDTH, WIDTH), torch.inf)},
        {f"{Q}.dense_scale": torch.rand(WIDTH + 1)},
        {f"{Q}.dense_scale": None},
        {f"{V}.dense_signs": torch.zeros(NARROW, WIDTH // 8 + 1, dtype=torch.uint8)},
        {f"{V}.dense_signs": torch.zeros(NARROW, WIDTH // 8, dtype=torch.int8)},
        {f"{V}.dense": torch.rand(NARROW, WIDTH)},
        {f"{Q}.blocks": torch.rand(WIDTH, 3)},
        {f"{Q}.blocks": torch.rand(WIDTH + 4, 4)},
        {f"{Q}.blocks": torch.rand(WIDTH)},
        {f"{Q}.blocks": torch.rand(WIDTH, 4).half()},
        {f"{Q}.blocks": torch.full((WIDTH, 4), torch.nan)},
        {f"{Q}.scale": torch.rand(WIDTH - 1)},
        {f"{Q}.pair": torch.rand(WIDTH).half()},
        {f"{Q}.stride": torch.tensor([WIDTH])},
        {f"{Q}.stride": torch.tensor([-1])},
        {f"{Q}.stride": torch.tensor([1, 2])},
        {f"{Q}.stride": None},
        {"model.embed_tokens.blocks": torch.rand(VOCABULARY, 1)},
        {
            "model.embed_tokens.dense": torch.rand(WIDTH, VOCABULARY),
            "model.embed_tokens.dense_scale": torch.rand(WIDTH),
        },
        {f"{NORM}.scale": torch.rand(WIDTH + 1)},
        {f"{NORM}.blocks": torch.rand(WIDTH, 1)},
        {f"{NORM}.a": torch.rand(2, WIDTH), f"{NORM}.b": torch.rand(WIDTH, 2), f"{NORM}.d": torch.rand(2)},
        {"model.other.stride": torch.tensor([1])},
    ],
)
def test_other_forms_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, torch.Tensor | None]) -> None:
    assert load({NAMES[0]: save(OTHERS)}, tmp_path).keys() == other_forms().keys()
    tensors = {name: tensor for name, tensor in {**OTHERS, **change}.items() if tensor is not None}
    with pytest.raises(AdapterInvalid) as caught:
        load({NAMES[0]: save(tensors)}, tmp_path)
    assert caught.value.code == "shape_mismatch"


def test_as_many_modules_as_the_base_has(tmp_path: Path) -> None:
    """Three tensors each: more than an upload may hold."""
    count, width = 7_000, 256
    names = [f"model.layers.{number}.mlp.experts.down_proj" for number in range(count)]
    specs = dict.fromkeys(names, ModuleSpec("linear", width, width))
    paths = {forms_file.FORMS_FILE: tmp_path / "forms"}
    made = {name: (LowRank(ints(1, width), ints(width, 1), torch.ones(1)),) for name in names}
    paths[forms_file.FORMS_FILE].write_bytes(forms_file.dump(made)[forms_file.FORMS_FILE])
    assert len(forms_file.load(paths, BaseSpec("many", "f" * 64, specs), Limits())) == count
    with pytest.raises(AdapterInvalid) as caught:
        forms_file.load(paths, BASE, Limits())
    assert caught.value.code == "header_limits"
