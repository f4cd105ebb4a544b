"""Small files, small functions, and a `kernels` package that transformers can stumble over unharmed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract.sources import ROOT, Source, sources

MAX_FILE, MAX_FUNCTION = 400, 60


@pytest.mark.parametrize("source", sources(), ids=lambda source: str(source.path))
def test_size(source: Source) -> None:
    assert source.lines <= MAX_FILE
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno + 1 <= MAX_FUNCTION, node.name


CPP = sorted(path for path in (ROOT / "kernels").rglob("*") if path.suffix in (".cpp", ".h"))


@pytest.mark.parametrize("path", CPP, ids=lambda path: path.name)
def test_size_of_cpp(path: Path) -> None:
    assert path.read_text().count("\n") <= MAX_FILE


def test_every_module_says_what_it_is() -> None:
    bare = [str(source.path) for source in sources() if source.tree.body and not ast.get_docstring(source.tree)]
    assert bare == []


def test_kernels_package_holds_a_docstring_and_a_version_only() -> None:
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    assert len(body) == 2
    docstring, version = body
    assert isinstance(docstring, ast.Expr)
    assert isinstance(version, ast.Assign)
    assert ast.unparse(version) == "__version__ = '0.0.0'"


LOAD = """
import sys, tempfile
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
config = LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=1, vocab_size=32)
with tempfile.TemporaryDirectory() as folder:
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 32)
import kernels
assert kernels.__file__.startswith(sys.argv[1]), kernels.__file__
assert not torch.cuda.is_initialized()
assert not [name for name in sys.modules if name.startswith("kernels.")]
"""


def test_transformers_loads_a_model_beside_our_kernels() -> None:
    """`kernels` is also the name of a Hugging Face package that transformers probes for."""
    subprocess.run([sys.executable, "-c", LOAD, str(ROOT)], check=True, cwd=ROOT)
