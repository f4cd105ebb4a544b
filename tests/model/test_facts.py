"""Facts read from configs, odd ones included."""

from types import SimpleNamespace as Config

import pytest

from server.model.errors import ModelLoadError
from server.model.facts import attention_shape, eos_token_ids, max_context
from tests.support.models import tiny_model


def test_attention_shape() -> None:
    assert attention_shape(Config(num_attention_heads=8, hidden_size=64)) == (8, 8, 8)
    assert attention_shape(Config(num_attention_heads=8, num_key_value_heads=2, hidden_size=64)) == (8, 2, 8)
    assert attention_shape(Config(num_attention_heads=4, head_dim=32, hidden_size=64)) == (4, 4, 32)
    assert attention_shape(tiny_model("gpt2").config) == (4, 4, 16)


@pytest.mark.parametrize("heads", [None, 0, "8"])
def test_a_config_without_heads_is_refused(heads: object) -> None:
    with pytest.raises(ModelLoadError, match="num_attention_heads"):
        attention_shape(Config(num_attention_heads=heads))


def test_layers_that_differ_in_their_heads_are_refused() -> None:
    class PerLayer:
        num_attention_heads = 4
        num_key_value_heads = 2

        @property
        def head_dim(self) -> int:
            raise RuntimeError("per-layer attribute")

    with pytest.raises(ModelLoadError, match="layers differ"):
        attention_shape(PerLayer())


def test_max_context() -> None:
    assert max_context(Config(max_position_embeddings=2048)) == 2048
    assert max_context(Config(max_position_embeddings=2048, rope_parameters={"rope_type": "yarn"})) == 2048
    assert max_context(tiny_model("gpt2").config) == 256


def test_longrope_stays_within_the_original_length() -> None:
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 4096}
    assert max_context(Config(max_position_embeddings=131072, rope_parameters=rope)) == 4096
    outside = Config(
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "longrope"},
        original_max_position_embeddings=4096,
    )
    assert max_context(outside) == 4096


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "expected"),
    [
        (2, 2, 9, (2,)),
        ([5, 6], 2, 9, (5, 6, 2)),
        (None, [3, 3], 9, (3,)),
        (None, None, 9, (9,)),
        (None, None, None, ()),
        (0, None, 9, (0,)),
    ],
)
def test_end_tokens(generation: object, config: object, tokenizer: object, expected: tuple[int, ...]) -> None:
    found = eos_token_ids(Config(eos_token_id=config), Config(eos_token_id=generation), Config(eos_token_id=tokenizer))
    assert found == expected
