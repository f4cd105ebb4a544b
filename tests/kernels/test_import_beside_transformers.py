"""Our package is named `kernels`, as one that transformers probes for and may import."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(script: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", script], check=True, cwd=ROOT, env=environment)


def test_importing_kernels_does_no_work() -> None:
    run(
        "import sys, kernels; "
        "assert kernels.__version__ and not [n for n in sys.modules if n.startswith(('torch', 'triton', 'kernels.'))]"
    )


def test_transformers_builds_and_runs_a_model_beside_kernels() -> None:
    run(
        "import kernels, sys, torch, transformers\n"
        f"assert kernels.__file__.startswith({str(ROOT)!r})\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "assert not is_kernels_available()\n"
        "config = transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64,\n"
        "    num_attention_heads=4, num_key_value_heads=2)\n"
        "model = transformers.AutoModelForCausalLM.from_config(config)\n"
        "out = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False, pad_token_id=0)\n"
        "assert out.shape[0] == 1 and 4 <= out.shape[1] <= 6\n"
        "assert not [n for n in sys.modules if n.startswith('kernels.')]\n"
    )
