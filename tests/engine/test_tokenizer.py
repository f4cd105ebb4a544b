"""Text to tokens and back; an answer's text as it streams is the text of all its tokens."""

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers

from server.engine.tokenizer import MAX_CHAT_BYTES, TextStream, Tokenizer
from server.errors import InvalidRequest
from tests.engine.fakes import tokenizer
from tests.support.models import BOS, BOS_ID, CHAT_TEMPLATE, EOS, EOS_ID, PAD, PAD_ID, VOCABULARY, tiny_tokenizer

TEXTS = [
    "",
    "hello world",
    "naïve café",
    "日本語のテキスト",
    "Привет, мир",
    "مرحبا",
    "🙂👩‍👩‍👧",
    "a\u0301 \ufffd end",
    "\x00\x7f",
]


def streamed(tokens: list[int], prompt: list[int]) -> str:
    stream = tokenizer().stream(prompt)
    return "".join([stream.push(token) for token in tokens]) + stream.flush()


@pytest.mark.parametrize("text", TEXTS)
def test_encode_and_decode_are_inverse(text: str) -> None:
    ids = tokenizer().encode(text)
    assert tokenizer().decode(ids) == text
    assert all(0 <= token < VOCABULARY for token in ids)


def test_special_tokens() -> None:
    own = tokenizer()
    assert own.encode("<eos>") == [EOS_ID]
    assert own.decode([EOS_ID, *own.encode("a")], skip_special_tokens=True) == "a"
    assert own.decode([EOS_ID]) == "<eos>"
    assert [own.is_special(token) for token in (PAD_ID, BOS_ID, EOS_ID, 3)] == [True, True, True, False]


def test_single_bytes_show_as_replacement_characters() -> None:
    own = tokenizer()
    [first, *rest] = own.encode("語")
    assert rest
    assert own.token_text(first) == "\ufffd"


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", TEXTS)
def test_a_streamed_answer_is_the_decoded_answer(text: str, prompt: str) -> None:
    """Also where the prompt ends in U+FFFD itself: none of the prompt may come out with the answer."""
    assert streamed(tokenizer().encode(text), tokenizer().encode(prompt)) == text


def test_characters_are_released_whole() -> None:
    own = tokenizer()
    stream = own.stream([])
    pieces = [stream.push(token) for token in own.encode("日本🙂")]
    assert "".join(pieces) == "日本🙂"
    assert "\ufffd" not in "".join(pieces)
    assert pieces.count("") == len(pieces) - 3


def test_an_unfinished_character_shows_at_the_end_only() -> None:
    own = tokenizer()
    stream = own.stream([])
    tokens = own.encode("a🙂")[:-1]
    assert "".join(stream.push(token) for token in tokens) == "a"
    assert stream.flush() == own.decode(tokens)[1:]
    assert "\ufffd" in own.decode(tokens)


def test_flush_without_anything_left_is_empty() -> None:
    stream = tokenizer().stream([])
    assert stream.flush() == ""
    stream.push(tokenizer().encode("a")[0])
    assert stream.flush() == ""


def test_special_tokens_are_left_out_of_the_text() -> None:
    [a] = tokenizer().encode("a")
    assert streamed([a, EOS_ID, BOS_ID, a, PAD_ID], []) == "aa"


def test_tokens_beyond_the_tokenizer_are_no_text() -> None:
    """A padded output head may choose ids that the tokenizer has no entry for."""
    [a] = tokenizer().encode("a")
    assert streamed([a, VOCABULARY - 1, 10_000, a], [a, VOCABULARY - 1]) == "aa"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=30), st.text(max_size=10))
@example("x", "one \ufffd")
@example("\ufffd\ufffd x", "\ufffd")
def test_random_text_streams_unchanged(text: str, prompt: str) -> None:
    own = tokenizer()
    assert streamed(own.encode(text), own.encode(prompt)) == own.decode(own.encode(text), skip_special_tokens=True)


soups = st.lists(st.integers(0, len(tiny_tokenizer()) - 1), max_size=30)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(soups, st.sampled_from(["", "one", "日本語", "one \ufffd"]))
def test_token_soups_stream_as_they_decode(tokens: list[int], prompt: str) -> None:
    """Most soups are no valid UTF-8; every byte must come out once, as text or as U+FFFD."""
    assert streamed(tokens, tokenizer().encode(prompt)) == tokenizer().decode(tokens, skip_special_tokens=True)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(soups, soups)
def test_prompts_of_any_tokens_never_leak_into_the_answer(tokens: list[int], prompt: list[int]) -> None:
    """A prompt of token ids may end within a character; then its bytes may be lost, but no text is repeated."""
    text = streamed(tokens, prompt)
    assert text.replace("\ufffd", "") == tokenizer().decode(tokens, skip_special_tokens=True).replace("\ufffd", "")


def sentencepiece_like() -> FastTokenizer:
    """As Llama 2's: spaces are "▁", bytes are tokens of their own, a text's first space is dropped."""
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    for piece in ("▁", "a", "b", "▁a", "▁b", "ab", "▁ab", "語"):
        vocabulary[piece] = len(vocabulary)
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b")]
    fast = FastTokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return fast


@pytest.mark.parametrize("prompt", ["a", "ab b", "語", "é", ""])
@pytest.mark.parametrize("answer", [" a b", "ab", " 語 a", "é b", "日本 a🙂b", " "])
def test_a_tokenizer_that_drops_first_spaces_keeps_those_of_the_answer(prompt: str, answer: str) -> None:
    fast = sentencepiece_like()
    before = fast.encode(prompt).ids
    tokens = fast.encode(prompt + answer).ids[len(before) :]
    assert fast.decode(before + tokens) == prompt + answer
    stream = TextStream(fast, before)
    text = "".join([stream.push(token) for token in tokens]) + stream.flush()
    assert text == (answer if prompt else fast.decode(tokens))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 264), max_size=20))
def test_byte_tokens_in_any_order_never_raise_and_lose_no_letter(tokens: list[int]) -> None:
    """The library gives up on some byte sequences; the stream must go on behind them."""
    fast = sentencepiece_like()
    stream = TextStream(fast, fast.encode("a").ids)
    text = "".join([stream.push(token) for token in tokens]) + stream.flush()
    whole = fast.decode([*fast.encode("a").ids, *tokens])[1:]
    assert [c for c in text if c in "ab語"] == [c for c in whole if c in "ab語"]


class TestChat:
    MESSAGES: tuple[dict[str, Any], ...] = ({"role": "user", "content": "hi"},)

    def test_the_template_of_the_base_model(self) -> None:
        assert tokenizer().render_chat(list(self.MESSAGES)) == "<user>hi<eos><assistant>"
        assert tokenizer().render_chat(list(self.MESSAGES), add_generation_prompt=False) == "<user>hi<eos>"

    def test_no_template_is_said_clearly(self) -> None:
        plain = tiny_tokenizer()
        plain.chat_template = None
        with pytest.raises(InvalidRequest) as caught:
            Tokenizer(plain).render_chat(list(self.MESSAGES))
        assert caught.value.code == "no_chat_template"

    def test_facts_for_clients(self) -> None:
        plain = tiny_tokenizer()
        facts = Tokenizer(plain).facts
        assert (facts.bos_token, facts.eos_token, facts.pad_token, facts.unk_token) == (BOS, EOS, PAD, None)
        assert facts.chat_template == CHAT_TEMPLATE
        plain.chat_template = {"default": CHAT_TEMPLATE, "tools": CHAT_TEMPLATE}
        assert Tokenizer(plain).facts.chat_template is None

    @pytest.mark.parametrize(
        "template", ["{{ raise_exception('roles must alternate') }}", "{{ messages[5].content }}", "{% bad"]
    )
    def test_a_refusing_template_is_the_callers_error(self, template: str) -> None:
        refusing = tiny_tokenizer()
        refusing.chat_template = template
        with pytest.raises(InvalidRequest) as caught:
            Tokenizer(refusing).render_chat(list(self.MESSAGES))
        assert caught.value.param == "messages"

    def test_length_is_bounded(self) -> None:
        with pytest.raises(InvalidRequest, match="longer"):
            tokenizer().render_chat([{"role": "user", "content": "x" * MAX_CHAT_BYTES}])
