"""PEFT's mixed batch (`adapter_names=`) on the workload, in process."""

import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from tests.bench.workload import NEW_TOKENS, Case, adapter_name, prompt


class PeftPeer:
    """All adapters loaded into one PEFT model; each case is one `generate` call over a padded batch."""

    name = "peft"

    def __init__(self, model: Any, tokenizer: Any, folders: list[Path]) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.padding_side = "left"
        self._tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        self._model = PeftModel.from_pretrained(model, folders[0], adapter_name=folders[0].name)
        for folder in folders[1:]:
            self._model.load_adapter(folder, adapter_name=folder.name)
        self._model.eval()

    def run(self, case: Case) -> float:
        """Seconds for the whole case."""
        inputs = self._tokenizer([prompt(i) for i in range(case.concurrency)], return_tensors="pt", padding=True)
        names = [adapter_name(case, i) or "__base__" for i in range(case.concurrency)]
        start = time.perf_counter()
        with torch.inference_mode():
            self._model.generate(
                **inputs,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                adapter_names=names,
            )
        return time.perf_counter() - start
