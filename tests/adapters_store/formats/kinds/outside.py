"""Methods that PEFT does not have, against dense weights: an adapter is written by hand, imported, and must give the
logits of a copy of the base whose weights were changed as the method's paper says."""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from adapters_store.errors import AdapterInvalid
from adapters_store.formats import peft
from adapters_store.formats.peft import Imported
from adapters_store.limits import Limits
from tests.adapters_store.formats.kinds.support import IDS, LIMITS, edit_config, edit_tensors, imported
from tests.support import dense_forms
from tests.support.models import tiny_model

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "qwen2": ["k_proj", "up_proj"]}
Parts = dict[str, torch.Tensor]
# (weight [out, in], bias [out] or None, generator) -> a module's tensors by part, zero-mean and random
Make = Callable[[torch.Tensor, Any, torch.Generator], Parts]
# (weight [out, in], bias, tensors) -> the adapted weight [out, in] and bias
Adapt = Callable[[torch.Tensor, Any, Parts], tuple[torch.Tensor, Any]]
Delta = Callable[[torch.Tensor, Parts], torch.Tensor]


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator) * 0.3


def modules(base: Any, architecture: str) -> Mapping[str, torch.nn.Module]:
    """Those that `TARGETS` select."""
    ends = tuple(TARGETS[architecture])
    return {name: module for name, module in base.named_modules() if name.rpartition(".")[2] in ends}


def matrix(module: Any) -> torch.Tensor:
    """[out, in], of a Conv1D too."""
    weight: torch.Tensor = module.weight
    return weight if isinstance(module, torch.nn.Linear) else weight.T


def write(base: Any, architecture: str, fields: Mapping[str, Any], folder: Path, make: Make, seed: int = 0) -> Parts:
    """The two files of an adapter of all targets. Gives all tensors by their full names."""
    generator = torch.Generator().manual_seed(seed)
    found: Parts = {}
    for name, module in modules(base, architecture).items():
        parts = make(matrix(module).clone(), module.bias, generator)
        found |= {
            f"base_model.model.{name}.{part}": value.detach().clone().contiguous() for part, value in parts.items()
        }
    folder.mkdir(parents=True, exist_ok=True)
    told = {"task_type": "CAUSAL_LM", "target_modules": TARGETS[architecture], **fields}
    (folder / peft.CONFIG_FILE).write_text(json.dumps(told))
    save_file(found, folder / peft.WEIGHTS_FILE)
    return found


def adapted_model(base: Any, architecture: str, tensors: Parts, adapt: Adapt) -> Any:
    """A copy of the base with new weights and biases."""
    model = copy.deepcopy(base)
    with torch.inference_mode():
        for name, module in modules(model, architecture).items():
            prefix = f"base_model.model.{name}."
            parts = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            weight, bias = adapt(matrix(module), module.bias, parts)
            module.weight = torch.nn.Parameter(weight if isinstance(module, torch.nn.Linear) else weight.T)
            module.register_parameter("bias", None if bias is None else torch.nn.Parameter(bias))
    return model


def adapted(base: Any, architecture: str, tensors: Parts, adapt: Adapt) -> torch.Tensor:
    """Its logits."""
    with torch.inference_mode():
        found: torch.Tensor = adapted_model(base, architecture, tensors, adapt)(IDS, use_cache=False).logits
    return found


def check(
    architecture: str,
    fields: Mapping[str, Any],
    folder: Path,
    make: Make,
    adapt: Adapt,
    limits: Limits = LIMITS,
    tolerance: float = 1e-4,
) -> Imported:
    """The forms' logits against those of the adapted weights, and against another adapter's, which must differ."""
    base = tiny_model(architecture)
    tensors = write(base, architecture, fields, folder / "a", make)
    found, weights = imported(folder / "a", base, limits)
    with torch.inference_mode():
        plain = base(IDS).logits
    expected = adapted(base, architecture, tensors, adapt)
    scale = (expected - plain).abs().max()
    assert scale > 1e-3, "the adapter changes nothing, so nothing is tested"
    ours = dense_forms.logits(base, weights, IDS)
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    write(base, architecture, fields, folder / "b", make, seed=1)
    other = dense_forms.logits(base, imported(folder / "b", base, limits)[1], IDS)
    assert (other - expected).abs().max() > 0.01 * scale, "another adapter gives the same"
    return found


def added(delta: Delta) -> Adapt:
    """For methods that add `delta(weight, tensors)` [out, in] to the weight."""
    return lambda weight, bias, parts: (weight + delta(weight, parts), bias)


def refused(folder: Path, base: Any, code: str, match: str = ".", limits: Limits = LIMITS) -> None:
    """The folder's adapter must be refused with this code, or one of several."""
    with pytest.raises(AdapterInvalid, match=match) as caught:
        imported(folder, base, limits)
    assert caught.value.code in code.split("|"), caught.value.message


def check_refusals(fields: Mapping[str, Any], folder: Path, make: Make) -> None:
    """Every part missing, of another shape and with a NaN; an unknown field that is on; an embedding as a target."""
    base = tiny_model("llama")
    tensors = write(base, "llama", fields, folder, make)
    first = next(iter(modules(base, "llama")))
    names = [name for name in tensors if f".{first}." in name]
    for name in names:
        changes = [(_stretch, "shape_mismatch")]
        changes += [(_drop, "shape_mismatch|bad_tensor_entry")] if len(names) > 1 else []
        changes += [(_spoil, "nonfinite_weights")] if tensors[name].is_floating_point() else []
        for change, code in changes:
            write(base, "llama", fields, folder, make)
            edit_tensors(folder, lambda found, name=name, change=change: change(found, name))  # type: ignore[misc]
            refused(folder, base, code)
    write(base, "llama", fields, folder, make)
    edit_config(folder, brand_new_feature=True)
    refused(folder, base, "bad_config", "brand_new_feature")
    write(base, "llama", fields, folder, make)
    edit_config(folder, target_modules=[*TARGETS["llama"], "embed_tokens"])
    edit_tensors(folder, lambda found: _move(found, first, "model.embed_tokens"))
    refused(folder, base, "feature_unsupported", "embedding")


def _drop(tensors: Parts, name: str) -> None:
    del tensors[name]


def _stretch(tensors: Parts, name: str) -> None:
    tensors[name] = torch.cat([tensors[name].view(-1), torch.ones(1).to(tensors[name].dtype)]).repeat(1, 1, 1)


def _spoil(tensors: Parts, name: str) -> None:
    tensors[name].view(-1)[0] = float("nan")


def _move(tensors: Parts, module: str, other: str) -> None:
    for name in [name for name in tensors if f".{module}." in name]:
        tensors[name.replace(f".{module}.", f".{other}.")] = tensors.pop(name)
