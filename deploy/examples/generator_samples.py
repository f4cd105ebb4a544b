"""What a generator learns from: checkpoints saved while an adapter is trained, and task vectors."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adapters_store.formats import peft
from adapters_store.forms import BaseSpec, LowRank
from adapters_store.generation.conditions import task_vector
from adapters_store.limits import Limits

from .tasks import Task
from .train import Recipe, fresh, optimise, save

Adapter = Mapping[str, LowRank]
LAYERS = list(range(20, 30))  # the last ten: nothing is computed backwards below them
# As few numbers as can learn a task, 7,680: what a generator costs to train grows with them.
LORA = {"r": 1, "lora_alpha": 8, "target_modules": ["v_proj"], "layers_to_transform": LAYERS}
NEW_TOKENS = 16  # forward calls of an example, at most


def checkpoints(base: Any, tokenizer: Any, task: Task, recipe: Recipe, keep: int, seed: int, out: Path) -> Any:
    """Trains an adapter unless `out` is there, with the adapter of each of the last `keep` steps in a folder of `out`.

    Returns the base without the adapter. Adapters of one seed begin with equal factors, whatever their task.
    """
    if out.exists():
        return base
    model = fresh(base, recipe, seed)
    partial = out.with_name(f".{out.name}")
    shutil.rmtree(partial, ignore_errors=True)

    def after(step: int) -> None:
        if step > recipe.steps - keep:
            save(model, partial / f"{step:04}")

    optimise(model, tokenizer, task, recipe, seed, after)
    partial.rename(out)
    return model.unload()


def read(folder: Path, spec: BaseSpec) -> list[Adapter]:
    """The adapters of `checkpoints`, in order."""
    found: list[Adapter] = []
    for each in sorted(folder.iterdir()):
        config = (each / peft.CONFIG_FILE).read_bytes()
        loaded = peft.Loader(spec, Limits()).load(config, each / peft.WEIGHTS_FILE, each.name)
        found.append({name: form for name, (form,) in loaded.modules.items() if isinstance(form, LowRank)})
    return found


def mean(adapters: Sequence[Adapter]) -> Adapter:
    """The mean of each factor."""
    made = {}
    for name, first in adapters[0].items():
        a, b = (
            torch.stack([getattr(each[name], part).float() for each in adapters]).mean(0).to(first.a.dtype)
            for part in ("a", "b")
        )
        made[name] = LowRank(a, b, first.d)
    return made


@torch.inference_mode()
def apply(model: Any, adapter: Adapter) -> None:
    """Puts the adapter into a PEFT model with one adapter on the same modules, of the same rank and scale."""
    for name, form in adapter.items():
        module = model.base_model.model.get_submodule(name)
        module.lora_A["default"].weight.copy_(form.a)
        module.lora_B["default"].weight.copy_(form.b * (form.d / module.scaling["default"]))


@torch.inference_mode()
def condition(model: Any, tokenizer: Any, prompts: Sequence[str]) -> torch.Tensor:
    """The task vector, float32 [hidden], of greedy answers to these prompts by the model as it is.

    As in the released code, but for beams: the output of the last decoder layer at the last position of every forward
    call.
    """
    calls: list[torch.Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        calls.append(hidden[0, -1].clone())

    layers = next(module for name, module in model.named_modules() if name.endswith("model.layers"))
    hook = layers[-1].register_forward_hook(keep)
    examples = []
    try:
        model.eval()
        for prompt in prompts:
            calls.clear()
            rows = tokenizer(prompt, return_tensors="pt")
            model.generate(**rows, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=tokenizer.eos_token_id)
            examples.append(torch.stack(calls))
    finally:
        hook.remove()
    return task_vector(examples)
