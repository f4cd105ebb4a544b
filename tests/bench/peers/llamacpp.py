"""llama.cpp's server at Q8_0: the default model and the adapters as GGUF files, each request with its adapter's scale.

It takes requests of different adapters at once and batches those of the same one. Runs in this environment; what is
somebody else's is the binary.
"""

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import httpx
import numpy as np
import torch
from safetensors.torch import load_file

from server.model.source import default_gguf
from tests.bench.client import Call, LoadClient, run_of
from tests.bench.peers.protocol import Request, Run
from tests.support.server_process import free_port

START_SECONDS = 120
PARTS = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def write_base(target: Path) -> Path:
    """The default model's own GGUF file with its matrices as Q8_0."""
    if target.is_file():
        return target
    reader = gguf.GGUFReader(default_gguf())
    partial = target.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    for name, entry in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            inner = entry.types[1] if len(entry.types) > 1 else None
            writer.add_key_value(name, entry.contents(), entry.types[0], inner)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    for tensor in reader.tensors:
        kind = gguf.GGMLQuantizationType.F32 if len(tensor.shape) == 1 else gguf.GGMLQuantizationType.Q8_0
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    _finish(writer)
    return partial.rename(target)


def write_adapter(folder: Path, target: Path, heads: dict[str, int]) -> Path:
    """A PEFT folder as llama.cpp reads it: its own names, query and key rows in the order of its rotation."""
    config = json.loads((folder / "adapter_config.json").read_text())
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(config["lora_alpha"]))
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        *_, layer, _, part, kind, _ = name.split(".")
        values = tensor.to(torch.float32)
        if kind == "lora_B" and part in heads:
            rows = values.view(heads[part], 2, -1, values.shape[1])
            values = rows.transpose(1, 2).reshape(values.shape)
        writer.add_tensor(f"blk.{layer}.{PARTS[part]}.weight.{kind.lower()}", values.to(torch.float16).numpy())
    _finish(writer)
    return target


class LlamaCpp:
    """One `llama-server` with every adapter loaded and none applied."""

    name = "llama.cpp"

    def __init__(self, binary: str, folders: Sequence[Path], heads: dict[str, int], work: Path, scratch: Path) -> None:
        version = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False).stderr
        self.facts = {"version": (version.strip().splitlines() or ["unknown"])[0], "weights": "Q8_0"}
        base = write_base(work / "base-q8_0.gguf")
        adapters = [write_adapter(folder, scratch / f"{folder.name}.gguf", heads) for folder in folders]
        self._numbers = {folder.name: number for number, folder in enumerate(folders)}
        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
        self._client = LoadClient(self._url)
        # 16 slots of 2048 tokens, as many requests as the largest case sends.
        command = [binary, "--model", str(base), "--port", str(port), "--parallel", "16", "--ctx-size", "32768"]
        command += ["--lora", ",".join(map(str, adapters)), "--lora-init-without-apply"]
        self._log = scratch / "llama-server.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def run(self, requests: Sequence[Request]) -> Run:
        seconds, streams = self._client.run([self._call(request) for request in requests])
        for request, stream in zip(requests, streams, strict=True):
            made = json.loads(stream.last)["tokens_predicted"]
            if made != request.new_tokens:
                raise RuntimeError(f"llama.cpp made {made} tokens instead of {request.new_tokens}")
        # The last event has no token of its own.
        times = [stream.times[: request.new_tokens] for request, stream in zip(requests, streams, strict=True)]
        return run_of(seconds, sum(request.new_tokens for request in requests), times)

    def close(self) -> None:
        self._client.close()
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _call(self, request: Request) -> Call:
        body: dict[str, Any] = {"prompt": request.prompt, "n_predict": request.new_tokens, "ignore_eos": True}
        body |= {"stream": True, "cache_prompt": False, "temperature": 0}
        # Without the field every adapter loaded is applied, whatever the server was told at its start.
        adapter = self._numbers[request.adapter] if request.adapter else 0
        body["lora"] = [{"id": adapter, "scale": 1.0 if request.adapter else 0.0}]
        return Call("/completion", body)

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if httpx.get(f"{self._url}/health", timeout=5, trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)  # nothing to wait on but the port
        raise RuntimeError(f"llama-server did not start: {self._log.read_text(errors='replace')[-600:]}")


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
