"""PEFT's mixed batch (`adapter_names=`): each run is one `generate` call over a padded batch."""

import argparse
from functools import partial
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.bench.peers.protocol import Peer, Request, serve, timed


class Peft:
    """All adapters loaded into one PEFT model."""

    def __init__(self, base: Path, adapters: Path, dtype: torch.dtype) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
        self._tokenizer.pad_token = self._tokenizer.pad_token or self._tokenizer.eos_token
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        folders = sorted(adapters.iterdir())
        self._model = peft.PeftModel.from_pretrained(model, folders[0], adapter_name=folders[0].name)
        for folder in folders[1:]:
            self._model.load_adapter(folder, adapter_name=folder.name)
        self._model.eval()

    def generate(self, requests: list[Request]) -> int:
        inputs = self._tokenizer([request.prompt for request in requests], return_tensors="pt", padding=True)
        new_tokens = requests[0].new_tokens
        with torch.inference_mode():
            answers = self._model.generate(
                **inputs,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                adapter_names=[request.adapter or "__base__" for request in requests],
            )
        return int(answers[:, inputs["input_ids"].shape[1] :].numel())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()

    def start() -> Peer:
        model = Peft(options.base, options.adapters, getattr(torch, options.dtype))
        return partial(timed, model.generate), {"version": peft.__version__, "weights": options.dtype}

    serve(start)


if __name__ == "__main__":
    main()
