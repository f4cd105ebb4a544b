"""Trains the example adapters with PEFT on the CPU, from the repository root:
`python -m deploy.examples.train [NAME ...]`, all of them without names."""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from .base import BASE_ID, greedy, left_padded, load_base
from .tasks import TASKS, Item, Task

ADAPTERS = Path(__file__).parent / "adapters"
MAX_BYTES = 1_500_000


@dataclass(frozen=True)
class Recipe:
    """How one adapter is trained; `lora` goes to `peft.LoraConfig` as it is."""

    lora: dict[str, Any]
    steps: int = 100
    batch: int = 16
    rate: float = 2e-3
    items: int = 1600


ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RECIPES: dict[str, Recipe] = {
    "casing": Recipe({"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}, steps=40),
    "date-iso": Recipe({"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}, steps=60),
    "legal-v2": Recipe({"r": 8, "lora_alpha": 8, "use_rslora": True, "target_modules": ["v_proj", "o_proj"]}, steps=50),
    "sentiment": Recipe({"r": 2, "lora_alpha": 4, "target_modules": ALL_LINEAR}, steps=40, rate=1e-3, items=960),
    "sql-v1": Recipe(
        {
            "r": 16,
            "lora_alpha": 32,
            "target_modules": ["q_proj", "v_proj"],
            "layers_to_transform": list(range(10, 30)),
        },
        steps=80,
    ),
    "ticket-router": Recipe(
        {
            "r": 8,
            "lora_alpha": 16,
            "target_modules": ["q_proj", "v_proj", "o_proj"],
            "rank_pattern": {"q_proj": 4},
            "alpha_pattern": {"q_proj": 12},
        },
        steps=40,
        items=960,
    ),
    "units-json": Recipe({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}, steps=60),
}


def batches(items: list[Item], tokenizer: Any, size: int, seed: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Endless batches of ids, mask, positions and labels, int64 [size, longest]; labels off the answer are -100."""
    rng = random.Random(seed)
    rows = []
    for item in items:
        prompt = tokenizer(item.prompt).input_ids
        answer = [*tokenizer(f" {item.answer}\n").input_ids, tokenizer.eos_token_id]
        rows.append((prompt + answer, [-100] * len(prompt) + answer))
    while True:
        rng.shuffle(rows)
        for start in range(0, len(rows) - size + 1, size):
            chosen = rows[start : start + size]
            ids, mask, positions = left_padded([row for row, _ in chosen], tokenizer.eos_token_id)
            labels, _, _ = left_padded([label for _, label in chosen], -100)
            yield ids, mask, positions, labels


def loss_of(model: Any, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Mean cross-entropy of the answer tokens, a scalar in nats."""
    ids, mask, positions, labels = batch
    answer_columns = (labels != -100).any(0).sum().item()
    keep = int(answer_columns) + 1
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=keep).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1 - keep :].flatten())


def train(task: Task, recipe: Recipe, seed: int) -> tuple[Any, Any]:
    """The base with a freshly trained adapter on it, and the tokenizer."""
    base, tokenizer = load_base()
    return fit(base, tokenizer, task, recipe, seed), tokenizer


def fit(base: Any, tokenizer: Any, task: Task, recipe: Recipe, seed: int) -> Any:
    """The base, changed in place: with a freshly trained adapter on it. seed: of its first factors and its items."""
    model = fresh(base, recipe, seed)
    optimise(model, tokenizer, task, recipe, seed)
    return model


def fresh(base: Any, recipe: Recipe, seed: int) -> Any:
    """The base, changed in place: with an adapter on it that does nothing yet."""
    torch.manual_seed(seed)
    base.name_or_path = BASE_ID
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path=BASE_ID, **recipe.lora))


def optimise(
    model: Any,
    tokenizer: Any,
    task: Task,
    recipe: Recipe,
    seed: int,
    after: Callable[[int], object] = lambda step: None,
) -> None:
    """Trains what of the model asks for gradients, in place, on the task's items of that seed. after: of each step."""
    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.rate, weight_decay=0.0)
    warmup = max(1, recipe.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, max(0.0, (recipe.steps - step) / (recipe.steps - warmup)))
    )
    data = batches(task.items("train", recipe.items, seed), tokenizer, recipe.batch, seed)
    begun = time.monotonic()
    for step in range(1, recipe.steps + 1):
        loss = loss_of(model, next(data))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        after(step)
        if step % 10 == 0 or step == 1:
            seconds = time.monotonic() - begun
            print(f"{task.name} step {step}/{recipe.steps} loss {loss.item():.4f} {seconds:.0f} s", flush=True)


def save(model: Any, folder: Path) -> int:
    """Writes the adapter as a PEFT folder in bf16 and returns the size of the weights in bytes."""
    tensors = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
        if ".lora_A." in name or ".lora_B." in name
    }
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "adapter_model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)
    config = model.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": BASE_ID, "inference_mode": True}
    config["target_modules"] = sorted(config["target_modules"])
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    size = weights.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{folder.name}: {size} bytes of weights, at most {MAX_BYTES} allowed")
    return size


def main() -> None:
    """Trains, checks on a few held-out items and saves the adapters named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one or more of {', '.join(RECIPES)}; all if none")
    parser.add_argument("--out", type=Path, default=ADAPTERS, help="folder the adapter folders go to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; 1 gives the same weights on each run")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.names or RECIPES:
        if name not in RECIPES:
            parser.error(f"no task {name}; there are {', '.join(RECIPES)}")
        task = TASKS[name]
        model, tokenizer = train(task, RECIPES[name], args.seed)
        items = task.items("heldout", 32, args.seed + 1)
        texts = greedy(model, tokenizer, [item.prompt for item in items], task.max_new_tokens)
        right = sum(task.correct(item, text) for item, text in zip(items, texts, strict=True))
        wrong = [(i.answer, t) for i, t in zip(items, texts, strict=True) if not task.correct(i, t)]
        size = save(model, args.out / name)
        print(f"{name}: {right}/{len(items)} held out, {size} bytes, wrong: {wrong[:3]}", flush=True)


if __name__ == "__main__":
    main()
