"""Our top-level package shares its name with a Hugging Face one that transformers probes for."""

import subprocess
import sys
from pathlib import Path

from tests.support.models import save_tiny

_LOAD = """
import sys
import transformers
from transformers.utils.import_utils import is_kernels_available
available = is_kernels_available()
import kernels
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert not available, "transformers takes our package for its own"
assert "kernels.triton" not in sys.modules, "a probe must not load the GPU kernels"
assert "kernels.dispatch" not in sys.modules
print(kernels.__version__, type(model).__name__, kernels.__file__)
"""


def test_transformers_loads_a_model_beside_our_kernels(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    folder = save_tiny(tmp_path / "tiny")
    command = [sys.executable, "-c", _LOAD, str(folder)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0.0.0", "LlamaForCausalLM", str(root / "kernels" / "__init__.py")]
