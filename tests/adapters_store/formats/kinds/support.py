"""PEFT makes an adapter, the importer reads it, and both must give the same logits."""

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from adapters_store.errors import AdapterInvalid
from adapters_store.formats import importer, peft
from adapters_store.formats.peft import Imported
from adapters_store.formats.tuner_config import CommonConfig
from adapters_store.forms import AdapterWeights
from adapters_store.limits import Limits
from tests.adapters_store.support import spec_of
from tests.support import dense_forms
from tests.support.models import VOCABULARY, tiny_model

LIMITS = Limits()
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "qwen2": ["k_proj", "up_proj"]}
LINEAR = ("llama", "qwen2")  # for what PEFT does not do on gpt2's Conv1D
IDS = torch.arange(2, 26).view(1, -1) * 7 % VOCABULARY
Randomise = Callable[[str, torch.Tensor], None]


def options(architecture: str, **further: Any) -> dict[str, Any]:
    """What every config of a test has."""
    return {"task_type": "CAUSAL_LM", "target_modules": TARGETS[architecture], **further}


def randomise(name: str, parameter: torch.Tensor) -> None:
    """Away from the start, zero-mean."""
    parameter.normal_(0.0, 0.3)


def trained(
    architecture: str,
    config: PeftConfig,
    folder: Path,
    seed: int = 0,
    change: Randomise = randomise,
    sizes: Mapping[str, int] | None = None,
) -> tuple[Any, PeftModel]:
    """A base, and an adapter on a copy of it, all its trained parts random, saved in `folder`. sizes: of the base."""
    base = tiny_model(architecture, **(sizes or {}))
    torch.manual_seed(seed)
    adapted = get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                change(name, parameter)
    adapted.eval().save_pretrained(folder)
    return base, adapted


def imported(folder: Path, base: Any, limits: Limits = LIMITS) -> tuple[Imported, AdapterWeights]:
    """What the importer says of the folder, and its forms."""
    config, weights, spec = (folder / peft.CONFIG_FILE).read_bytes(), folder / peft.WEIGHTS_FILE, spec_of(base)
    return importer.inspect(config, weights, spec, limits), importer.Loader(spec, limits).load(
        config, weights, "d" * 64
    )


def check(
    architecture: str,
    config: PeftConfig,
    folder: Path,
    change: Randomise = randomise,
    sizes: Mapping[str, int] | None = None,
) -> Imported:
    """PEFT's logits against the forms', and against those of another adapter of the same method, which must differ."""
    base, adapted = trained(architecture, config, folder / "a", change=change, sizes=sizes)
    found, weights = imported(folder / "a", base)
    with torch.inference_mode():
        expected, plain = adapted(IDS).logits[:, -IDS.shape[1] :], base(IDS).logits  # no virtual tokens
    ours = dense_forms.logits(base, weights, IDS)
    scale = (expected - plain).abs().max()
    assert scale > 1e-3, "the adapter changes nothing, so nothing is tested"
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    trained(architecture, config, folder / "b", seed=1, change=change, sizes=sizes)
    other = dense_forms.logits(base, imported(folder / "b", base)[1], IDS)
    assert (other - expected).abs().max() > 0.01 * scale, "another adapter gives the same"
    return found


def edit_config(folder: Path, **changes: Any) -> None:
    """Overwrite fields of adapter_config.json."""
    path = folder / peft.CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Overwrite tensors of adapter_model.safetensors."""
    path = folder / peft.WEIGHTS_FILE
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def refused(folder: Path, base: Any, code: str, match: str = "") -> None:
    """The importer refuses the folder, when it is inspected and when it is loaded."""
    config, weights, spec = (folder / peft.CONFIG_FILE).read_bytes(), folder / peft.WEIGHTS_FILE, spec_of(base)
    with pytest.raises(AdapterInvalid, match=match) as caught:
        importer.inspect(config, weights, spec, LIMITS)
    assert caught.value.code == code, caught.value.message


def check_damage(architecture: str, config: PeftConfig, folder: Path, *parts: str, alone: bool = False) -> None:
    """Each part missing, of a wrong shape, a single number, or not finite is refused, and so is an unknown field.

    alone: it is all that a module has, and a module without anything is only told of, as for a LoRA.
    """
    for part in parts:

        def change(tensors: dict[str, torch.Tensor], how: str, part: str = part) -> None:
            name = next(name for name in tensors if name.endswith(part))
            if how == "missing":
                del tensors[name]
            elif how == "shape":
                tensors[name] = torch.cat([tensors[name], tensors[name]])
            elif how == "number":
                tensors[name] = torch.tensor(1.0)
            else:
                tensors[name].view(-1)[-1] = float("nan")

        codes = {
            "missing": "shape_mismatch",
            "shape": "shape_mismatch",
            "number": "shape_mismatch",
            "nan": "nonfinite_weights",
        }
        for how, code in codes.items():
            if alone and how == "missing":
                continue
            base, _ = trained(architecture, config, folder)
            edit_tensors(folder, lambda tensors, how=how: change(tensors, how))  # type: ignore[misc]
            named = part.removesuffix(".weight").rpartition(".")[2]
            refused(folder, base, code, match=named if how == "missing" else "")
    base, _ = trained(architecture, config, folder)
    edit_config(folder, made_up_by_a_later_release=True)
    refused(folder, base, "bad_config", match="made_up_by_a_later_release")


def check_fields(ours: type[CommonConfig], theirs: type[PeftConfig]) -> None:
    """Every field that PEFT writes is known."""
    known = {field.alias or name for name, field in ours.model_fields.items()}
    assert {field.name for field in dataclasses.fields(theirs)} <= known
