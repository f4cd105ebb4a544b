"""Held-out accuracy of the base model and of each example adapter: `python -m deploy.examples.evaluate [NAME ...]`.

Without options the models run in this process. With `--url` the same questions go to a running Polyrank server,
which must hold the adapters under their folder names."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from .base import BASE_ID, greedy, load_base
from .tasks import TASKS, Item, Task
from .tasks.core import first_line

ADAPTERS = Path(__file__).parent / "adapters"
SEED = 1
Answer = Callable[[str | None, Sequence[str], int], list[str]]
"""Adapter name (none: the base), prompts and the most new tokens, to one continuation per prompt."""


@dataclass(frozen=True)
class Score:
    """Right answers among `items` held-out questions, by exact match, and one wrong adapter answer if there is any.

    `base_any_case` also counts the base answers that differ only in upper and lower case; `wrong` is prompt, expected
    answer, given answer."""

    task: str
    items: int
    base_right: int
    base_any_case: int
    adapter_right: int
    wrong: tuple[str, str, str] | None

    def row(self) -> str:
        """One line of the Markdown table."""
        counts = (self.base_right, self.base_any_case, self.adapter_right)
        return f"| `{self.task}` | {self.items} | {' | '.join(f'{100 * n / self.items:.1f} %' for n in counts)} |"


def in_process(names: Sequence[str], adapters: Path) -> Answer:
    """Answers from the base model and PEFT in this process."""
    from peft import PeftModel

    base, tokenizer = load_base()
    model: Any = PeftModel.from_pretrained(base, str(adapters / names[0]), adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(str(adapters / name), adapter_name=name)

    def answer(adapter: str | None, prompts: Sequence[str], most: int) -> list[str]:
        if adapter is None:
            with model.disable_adapter():
                return greedy(model, tokenizer, prompts, most)
        model.set_adapter(adapter)
        return greedy(model, tokenizer, prompts, most)

    return answer


def from_server(url: str, concurrency: int) -> Answer:
    """Answers from a running server, `concurrency` requests at a time; its key, if it has keys, is POLYRANK_API_KEY."""
    key = os.environ.get("POLYRANK_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=concurrency)
    client = httpx.Client(base_url=url, headers=headers, timeout=300, limits=limits)

    def answer(adapter: str | None, prompts: Sequence[str], most: int) -> list[str]:
        params = {} if adapter is None else {"adapter": adapter}

        def ask(prompt: str) -> str:
            body = {"inputs": prompt, "parameters": {"max_new_tokens": most, "stop": ["\n"]}}
            reply = client.post("/generate", params=params, json=body)
            reply.raise_for_status()
            return str(reply.json()["generated_text"])

        with ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(ask, prompts))

    return answer


def score(task: Task, items: Sequence[Item], answer: Answer) -> Score:
    """Asks the base and the adapter of the same name the same questions."""
    prompts = [item.prompt for item in items]
    base = answer(None, prompts, task.max_new_tokens)
    tuned = answer(task.name, prompts, task.max_new_tokens)
    wrong = [(i.prompt, i.answer, text) for i, text in zip(items, tuned, strict=True) if not task.correct(i, text)]
    pairs = [(item.answer, first_line(text)) for item, text in zip(items, base, strict=True)]
    return Score(
        task=task.name,
        items=len(items),
        base_right=sum(want == got for want, got in pairs),
        base_any_case=sum(want.casefold() == got.casefold() for want, got in pairs),
        adapter_right=len(items) - len(wrong),
        wrong=wrong[0] if wrong else None,
    )


def table(scores: Sequence[Score]) -> str:
    """A Markdown table, one row per task."""
    head = ["| task | items | base | base, any case | adapter |", "|---|---|---|---|---|"]
    return "\n".join([*head, *(s.row() for s in scores)])


def main() -> None:
    """Scores the tasks named on the command line, all without names, and prints the table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one or more of {', '.join(TASKS)}; all if none")
    parser.add_argument("--items", type=int, default=64, help="held-out questions per task")
    parser.add_argument("--seed", type=int, default=SEED, help="which held-out questions")
    parser.add_argument("--adapters", type=Path, default=ADAPTERS, help="folder of adapter folders")
    parser.add_argument("--url", help="ask a running server, such as http://127.0.0.1:8000")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at a time, with --url")
    parser.add_argument("--threads", type=int, help="CPU threads, without --url")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    args = parser.parse_args()
    names = args.names or list(TASKS)
    if unknown := sorted(set(names) - set(TASKS)):
        parser.error(f"no task {', '.join(unknown)}; there are {', '.join(TASKS)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    answer = from_server(args.url, args.concurrency) if args.url else in_process(names, args.adapters)
    scores = []
    for name in names:
        scores.append(score(TASKS[name], TASKS[name].items("heldout", args.items, args.seed), answer))
        print(f"{name}: {scores[-1].adapter_right} of {args.items}", file=sys.stderr, flush=True)
    if args.json:
        scores_json = [asdict(s) for s in scores]
        print(json.dumps({"base": BASE_ID, "url": args.url, "seed": args.seed, "scores": scores_json}, indent=2))
    else:
        print(table(scores))


if __name__ == "__main__":
    main()
