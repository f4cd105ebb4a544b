"""Target modules and facts read from the model."""

from torch import nn

from adapters_store.forms import ModuleSpec
from server.model.loader import describe
from server.model.prepare import prepare_model
from server.model.spec import base_spec, module_spec
from tests.support.models import VOCABULARY, tiny_model, tiny_tokenizer


def test_llama_modules() -> None:
    spec = base_spec(tiny_model("llama"), "tiny/llama", "sha256:0")
    assert spec.modules["model.embed_tokens"] == ModuleSpec("embedding", VOCABULARY, 64)
    assert spec.modules["model.layers.2.self_attn.k_proj"] == ModuleSpec("linear", 64, 32)
    assert spec.modules["model.layers.0.mlp.down_proj"] == ModuleSpec("linear", 96, 64)
    assert spec.modules["lm_head"] == ModuleSpec("linear", 64, VOCABULARY)
    assert len(spec.modules) == 3 * 7 + 2
    assert (spec.id, spec.fingerprint, spec.head, spec.tied) == ("tiny/llama", "sha256:0", "lm_head", True)


def test_conv1d_stores_inputs_first() -> None:
    spec = base_spec(tiny_model("gpt2"), "tiny/gpt2", "")
    assert spec.modules["transformer.h.0.attn.c_attn"] == ModuleSpec("conv1d", 64, 192, bias=True)
    assert spec.modules["transformer.h.0.mlp.c_proj"] == ModuleSpec("conv1d", 256, 64, bias=True)
    assert spec.modules["transformer.wpe"] == ModuleSpec("embedding", 256, 64)


def test_biases_and_other_heads() -> None:
    assert base_spec(tiny_model("qwen2"), "", "").modules["model.layers.0.self_attn.q_proj"].bias
    neox = base_spec(tiny_model("gpt_neox"), "", "")
    assert neox.head == "lm_head"
    assert not neox.tied


def test_a_subclass_with_its_own_forward_is_no_target() -> None:
    class Odd(nn.Linear):
        def forward(self, input):  # type: ignore[no-untyped-def]  # noqa: A002, ANN001, ANN202
            return super().forward(input) * 2

    assert module_spec(Odd(2, 3)) is None
    assert module_spec(nn.LayerNorm(3)) is None


def test_a_scaled_embedding_tells_its_scale() -> None:
    assert module_spec(tiny_model("gemma").model.embed_tokens) == ModuleSpec("embedding", VOCABULARY, 64, scale=8.0)


def test_own_weights_can_be_read_before_and_after_wrapping() -> None:
    model = tiny_model("gpt2")
    base = describe(model, tiny_tokenizer(), "tiny/gpt2")
    assert base.spec.weight is not None
    name = "transformer.h.0.attn.c_attn"
    before = base.spec.weight(name)
    assert before.shape == (64, 192)
    prepare_model(base)
    assert base.spec.weight(name) is before


def test_the_position_table_of_opt_is_no_target() -> None:
    assert "model.decoder.embed_positions" not in base_spec(tiny_model("opt"), "", "").modules


def test_norms_as_wide_as_the_model() -> None:
    llama, gpt2 = base_spec(tiny_model("llama"), "", ""), base_spec(tiny_model("gpt2"), "", "")
    assert llama.norms["model.layers.1.input_layernorm"] == llama.norms["model.norm"] == 64
    assert len(llama.norms) == 3 * 2 + 1
    assert not llama.norm_offsets
    assert not llama.norm_biases
    assert set(gpt2.norms) == gpt2.norm_biases
    assert not gpt2.norm_offsets
    gemma = base_spec(tiny_model("gemma"), "", "")
    assert gemma.norm_offsets == dict.fromkeys(gemma.norms, 1.0)
    assert not any("q_norm" in name for name in base_spec(tiny_model("qwen3"), "", "").norms)


def test_a_norm_of_another_kind_is_left_out() -> None:
    class TwiceNorm(nn.LayerNorm):
        def forward(self, input):  # type: ignore[no-untyped-def]  # noqa: A002, ANN001, ANN202
            return super().forward(input) * 2

    model = tiny_model("gpt2")
    model.transformer.ln_f = TwiceNorm(64)
    nn.init.normal_(model.transformer.ln_f.weight)
    assert "transformer.ln_f" not in base_spec(model, "", "").norms


def test_the_embedding_of_the_prompt_and_the_shape_of_the_cache() -> None:
    llama, gpt2 = base_spec(tiny_model("llama"), "", ""), base_spec(tiny_model("gpt2"), "", "")
    assert (llama.input_embedding, llama.kv) == ("model.embed_tokens", (3, 2, 16))
    assert (gpt2.input_embedding, gpt2.kv) == ("transformer.wte", (3, 4, 16))
