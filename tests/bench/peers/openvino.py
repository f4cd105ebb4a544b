"""OpenVINO GenAI's continuous batching over an int8 export; runs in an environment with `openvino-genai`.

A pipeline that knows adapters is slow without one, and gives every row of a batch the adapters of the first. So base
rows get a pipeline without adapters, and mixed traffic goes one adapter at a time, each through a pipeline of its own.
Making the export needs `optimum-intel[openvino]` in the same environment.
"""

import argparse
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import openvino_genai as genai

from tests.bench.peers.protocol import Peer, Request, serve, timed


def export(base: Path, folder: Path) -> Path:
    """The int8 export of the base model, made once."""
    if not (folder / "openvino_model.xml").is_file():
        command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino", "--model", str(base)]
        command += ["--task", "text-generation-with-past", "--weight-format", "int8", str(folder)]
        subprocess.run(command, check=True)
    return folder


class OpenVino:
    """Pipelines by adapter, built when first asked for."""

    def __init__(self, model: Path, adapters: Path) -> None:
        self._model = model
        self._folder = adapters
        self._pipelines: dict[str | None, tuple[Any, Any]] = {}

    def generate(self, requests: list[Request]) -> int:
        groups: dict[str | None, list[Request]] = {}
        for request in requests:
            groups.setdefault(request.adapter, []).append(request)
        return sum(self._group(*self._pipeline(adapter), group) for adapter, group in groups.items())

    def _group(self, pipeline: Any, adapters: Any, group: list[Request]) -> int:
        configs = []
        for request in group:
            config = genai.GenerationConfig()
            config.max_new_tokens = request.new_tokens
            config.ignore_eos = True
            config.apply_chat_template = False
            if adapters is not None:
                config.adapters = adapters
            configs.append(config)
        results = pipeline.generate([request.prompt for request in group], configs)
        return int(results[0].perf_metrics.get_num_generated_tokens())  # every result counts the whole call's

    def _pipeline(self, name: str | None) -> tuple[Any, Any]:
        if name not in self._pipelines:
            scheduler = genai.SchedulerConfig()
            scheduler.cache_size = 1  # GiB, and the next two: this server's defaults
            scheduler.max_num_seqs = 64
            scheduler.max_num_batched_tokens = 512
            adapters = self._adapter(self._folder / name) if name else None
            properties = {"adapters": adapters} if adapters is not None else {}
            pipeline = genai.ContinuousBatchingPipeline(
                str(self._model), scheduler_config=scheduler, device="CPU", properties=properties
            )
            self._pipelines[name] = pipeline, adapters
        return self._pipelines[name]

    def _adapter(self, folder: Path) -> Any:
        config = json.loads((folder / "adapter_config.json").read_text())
        adapter = genai.Adapter(str(folder / "adapter_model.safetensors"))
        return genai.AdapterConfig(adapter, config["lora_alpha"] / config["r"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()

    def start() -> Peer:
        engine = OpenVino(export(options.base, options.work / "openvino-int8"), options.adapters)
        return partial(timed, engine.generate), {"version": genai.__version__, "weights": "int8"}

    serve(start)


if __name__ == "__main__":
    main()
