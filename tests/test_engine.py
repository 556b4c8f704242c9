"""Generation against transformers' own, and streaming of text against decoding it whole."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from quantlab.engine import (
    Sampler,
    Session,
    TokenStreamer,
    context_length,
    encode_prompt,
    end_tokens,
    generate,
    greedy,
    last_logits_only,
    text_pieces,
)
from quantlab.errors import ConfigError, ModelError

VOCABULARY = 97


def llama() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )


def gpt2() -> Any:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    )


def opt() -> Any:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
        )
    )


FAMILIES = [llama, gpt2, opt]


def build(make: Callable[[], Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = make().eval()
    # Random embeddings this small would repeat one token for ever; make the choices vary.
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 8
    return model


def random_ids(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()


# --- decoding ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", FAMILIES)
@pytest.mark.parametrize("prompt", [1, 2, 17])
def test_greedy_equals_transformers(make: Callable[[], Any], prompt: int) -> None:
    model = build(make)
    ids = random_ids(prompt)
    settings_ = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20}
    inputs = torch.tensor([ids])
    want = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), pad_token_id=0, **settings_
    )
    tokens = generate(model, ids, max_new_tokens=20)
    assert tokens == want[0, prompt:].tolist()
    assert len(set(tokens)) > 3


@pytest.mark.parametrize("make", FAMILIES)
def test_logits_are_those_of_the_whole_sequence(make: Callable[[], Any]) -> None:
    """Step by step on the cache as in one pass without it."""
    model = build(make)
    ids = random_ids(12)
    with torch.no_grad():
        whole = model(torch.tensor([ids]), use_cache=False).logits[0]
    session = Session(model)
    session.prefill(ids[:7])
    for position in range(7, 12):
        torch.testing.assert_close(session.logits, whole[position - 1], rtol=1e-4, atol=1e-4)
        session.step(ids[position])
    torch.testing.assert_close(session.logits, whole[-1], rtol=1e-4, atol=1e-4)
    assert session.logits.dtype == torch.float32


def test_sessions_decode_in_turn() -> None:
    """Several models token by token, each as if it were alone; a prefill starts over."""
    models_ = [build(llama, seed) for seed in range(3)]
    ids = random_ids(9)
    alone = [generate(model, ids, max_new_tokens=10) for model in models_]
    sessions = [Session(model) for model in models_]
    for _ in range(2):
        outputs = [[session.prefill(ids)] for session in sessions]
        for _ in range(9):
            for session, tokens in zip(sessions, outputs, strict=True):
                tokens.append(session.step(tokens[-1]))
        assert outputs == alone
    assert alone[0] != alone[1]


def test_only_the_last_logits_are_computed() -> None:
    model = build(llama)
    widths: list[int] = []
    model.lm_head.register_forward_hook(lambda m, inputs, y: widths.append(y.shape[1]))
    Session(model).prefill(random_ids(30))
    assert widths == [1]

    class Older:
        def forward(self, input_ids: Any, num_logits_to_keep: int = 0) -> None: ...

    class Oldest:
        def forward(self, input_ids: Any) -> None: ...

    assert last_logits_only(Older()) == {"num_logits_to_keep": 1}
    assert last_logits_only(Oldest()) == {}


def test_callbacks_end_and_stop() -> None:
    model = build(llama)
    ids = random_ids(5)
    tokens = generate(model, ids, max_new_tokens=12)
    seen: list[int] = []
    assert generate(model, ids, max_new_tokens=12, on_token=seen.append) == tokens == seen
    # The end token is the last one returned.
    end = tokens[4]
    assert generate(model, ids, max_new_tokens=12, eos_ids={end}) == tokens[: tokens.index(end) + 1]
    # stop() is asked before each token, so what exists is kept.
    counted: list[int] = []
    stopped = generate(
        model, ids, max_new_tokens=12, on_token=counted.append, stop=lambda: len(counted) == 3
    )
    assert stopped == tokens[:3]
    assert generate(model, ids, max_new_tokens=0) == []
    # As soon as the text contains a stop string, the tokens that make it included.
    reader = byte_level()
    texts = [decoded(reader, tokens[: n + 1]) for n in range(12)]
    at = next(n for n in range(4, 12) if not texts[n].endswith("\ufffd") and texts[n] != texts[3])
    ending = texts[at][len(texts[3]) - 1 :]
    first = next(n for n, text in enumerate(texts) if ending in text)
    stopped = generate(model, ids, max_new_tokens=12, stop_strings=[ending], tokenizer=reader)
    assert stopped == tokens[: first + 1]
    with pytest.raises(ConfigError, match="tokenizer"):
        generate(model, ids, max_new_tokens=5, stop_strings=["a"])
    with pytest.raises(ConfigError, match="stop: empty"):
        generate(model, ids, max_new_tokens=5, stop_strings=[""], tokenizer=reader)
    assert generate(model, ids, max_new_tokens=5, stop=lambda: True) == []


@pytest.mark.parametrize("make", FAMILIES)
def test_generation_ends_with_the_context(make: Callable[[], Any]) -> None:
    model = build(make)
    assert context_length(model) == 64
    assert len(generate(model, random_ids(60), max_new_tokens=50)) == 5
    assert len(generate(model, random_ids(64), max_new_tokens=50)) == 1
    with pytest.raises(ConfigError, match="65 tokens; this model reads at most 64"):
        Session(model).prefill(random_ids(65))
    with pytest.raises(ConfigError, match="no tokens"):
        generate(model, [], max_new_tokens=5)


def test_a_too_long_prompt_is_an_error_not_an_empty_answer() -> None:
    with pytest.raises(ConfigError, match="reads at most 64"):
        generate(build(llama), random_ids(80), max_new_tokens=5)


def test_step_needs_a_prefill() -> None:
    with pytest.raises(RuntimeError, match="before prefill"):
        Session(build(llama)).step(1)


# --- choosing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [5, 97, 49152])
def test_greedy_takes_the_lowest_of_equals(size: int) -> None:
    logits = torch.zeros(size)
    logits[[2, 3, size - 1]] = 7.5
    assert greedy(logits) == 2


def draws(sampler: Sampler, logits: torch.Tensor, count: int) -> list[int]:
    return [sampler(logits) for _ in range(count)]


def test_sampling_follows_the_distribution() -> None:
    """20,000 draws at temperature 2 within five standard deviations of each probability."""
    logits = torch.tensor([2.0, 0.0, 1.0, -3.0])
    probability = torch.softmax(logits / 2, -1)
    found = draws(Sampler(2.0, seed=1), logits, 20_000)
    for token, p in enumerate(probability.tolist()):
        spread = (p * (1 - p) / 20_000) ** 0.5
        assert found.count(token) / 20_000 == pytest.approx(p, abs=5 * spread)


def test_what_has_no_probabilities_is_told() -> None:
    with pytest.raises(ModelError, match="next token cannot be drawn: the logits give no"):
        Sampler(1.0)(torch.tensor([0.0, float("nan")]))


def test_top_p_keeps_the_smallest_sufficient_set() -> None:
    logits = torch.tensor([0.2, 0.5, 0.3]).log()
    assert set(draws(Sampler(1.0, 0.5, seed=0), logits, 200)) == {1}
    assert set(draws(Sampler(1.0, 0.51, seed=0), logits, 200)) == {1, 2}
    assert set(draws(Sampler(1.0, 0.81, seed=0), logits, 200)) == {0, 1, 2}
    assert set(draws(Sampler(1.0, 1e-9, seed=0), logits, 50)) == {1}
    # Exactly half is sufficient, and among equals the lower id comes first.
    assert set(draws(Sampler(1.0, 0.5, seed=0), torch.zeros(2), 50)) == {0}


def test_sampling_is_seeded() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    first = draws(Sampler(1.0, seed=3), logits, 30)
    assert first == draws(Sampler(1.0, seed=3), logits, 30)
    assert first != draws(Sampler(1.0, seed=4), logits, 30)
    model = build(llama)
    sampled = generate(model, random_ids(4), max_new_tokens=9, temperature=1.0, seed=5)
    again = generate(model, random_ids(4), max_new_tokens=9, temperature=1.0, seed=5)
    assert sampled == again
    assert sampled != generate(model, random_ids(4), max_new_tokens=9)


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1e-307])
def test_cold_sampling_is_greedy(temperature: float) -> None:
    logits = torch.tensor([-50.0, 1e4, 3.0, 9e3])
    assert set(draws(Sampler(temperature), logits, 20)) == {1}


@pytest.mark.parametrize(
    ("temperature", "top_p", "named"),
    [(-1.0, 1.0, "temperature"), (float("nan"), 1.0, "temperature"), (1.0, 0.0, "top_p"),
     (1.0, 1.5, "top_p"), (float("inf"), 1.0, "temperature")],
)  # fmt: skip
def test_impossible_settings_are_refused(temperature: float, top_p: float, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Sampler(temperature, top_p)


# --- text --------------------------------------------------------------------------------------

ODD = (
    "naïve café – «déjà» 日本語 ñ 🙂 👩\u200d👧 a\u0301 \u200f\u05e9\u05dc\u05d5\u05dd\t\n"
    "  double  spaces 'll \ufffd ẞ"
)


def byte_level() -> PreTrainedTokenizerFast:
    """Like GPT-2's, with few merges, so that most characters beyond ASCII are several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([ODD, "the cat sat on the mat. the end"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """Like Llama's: words begin with a mark that becomes a space, unknown characters are bytes."""
    words = ["▁the", "▁cat", "▁", "s", "at", "ll", ".", "é", "日"]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for token in [f"<0x{byte:02X}>" for byte in range(256)] + words + list(string.ascii_letters):
        vocabulary.setdefault(token, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


TOKENIZERS = {"byte level": byte_level(), "byte fallback": byte_fallback()}
by_tokenizer = pytest.mark.parametrize("kind", TOKENIZERS)


def decoded(tokenizer: Any, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@by_tokenizer
@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_pieces_are_the_text_for_any_tokens(kind: str, data: st.DataObject) -> None:
    """Random ids: broken UTF-8, special tokens and stray bytes everywhere."""
    tokenizer = TOKENIZERS[kind]
    ids = st.integers(0, len(tokenizer) - 1)
    tokens = data.draw(st.lists(ids, max_size=25))
    pieces = text_pieces(tokenizer, tokens)
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == decoded(tokenizer, tokens)


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=30))
def test_no_half_characters_are_shown(text: str) -> None:
    """For real text every prefix of the pieces is a prefix of it."""
    tokenizer = TOKENIZERS["byte level"]
    tokens = tokenizer(text)["input_ids"]
    streamer = TokenStreamer(tokenizer)
    shown = ""
    for token in tokens:
        shown += streamer.push(token)
        assert text.startswith(shown)
    assert shown + streamer.finish() == text


def test_a_character_of_many_tokens_comes_at_its_last() -> None:
    tokenizer = TOKENIZERS["byte level"]
    tokens = tokenizer("a𐍈b")["input_ids"]
    assert len(tokens) == 6
    assert text_pieces(tokenizer, tokens) == ("a", "", "", "", "𐍈", "b")
    assert text_pieces(tokenizer, tokens[:4]) == ("a", "", "", "�")


def test_spaces_between_words_survive() -> None:
    """Decoders drop the space at the start of what they are given; only the first one may go."""
    tokenizer = TOKENIZERS["byte fallback"]
    tokens = tokenizer.convert_tokens_to_ids(["▁the", "▁cat", "</s>", "▁the", "</s>", "▁cat"])
    assert text_pieces(tokenizer, tokens) == ("the", " cat", "", " the", "", " cat")


def test_byte_tokens_wait_for_the_end_of_their_run() -> None:
    """A later stray byte turns the whole run into replacement characters."""
    tokenizer = TOKENIZERS["byte fallback"]
    euro = ["<0xE2>", "<0x82>", "<0xAC>"]
    ids = tokenizer.convert_tokens_to_ids(["▁the", *euro, "s"])
    assert text_pieces(tokenizer, ids) == ("the", "", "", "", "€s")
    broken = tokenizer.convert_tokens_to_ids(["▁the", *euro, "<0xFF>", "s"])
    assert "".join(text_pieces(tokenizer, broken)) == decoded(tokenizer, broken)
    # A skipped special token does not end the run.
    hidden = tokenizer.convert_tokens_to_ids(["<0x41>", "</s>", "<0x80>"])
    assert "".join(text_pieces(tokenizer, hidden)) == decoded(tokenizer, hidden) == "\ufffd\ufffd"


# --- prompts -----------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<|end|>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_prompts_with_and_without_a_chat_template() -> None:
    tokenizer = byte_level()
    assert encode_prompt(tokenizer, "the cat") == tokenizer("the cat")["input_ids"]
    tokenizer.chat_template = TEMPLATE
    ids = encode_prompt(tokenizer, "the cat")
    assert tokenizer.decode(ids) == "<|end|>user: the cat\nassistant:"
    assert ids[0] == tokenizer.eos_token_id


def test_prompts_that_cannot_be() -> None:
    tokenizer = byte_level()
    with pytest.raises(ConfigError, match="prompt is empty"):
        encode_prompt(tokenizer, "")
    assert encode_prompt(byte_fallback(), "") == [1]
    tokenizer.chat_template = "{{ raise_exception('system message first') }}"
    with pytest.raises(ModelError, match="system message first"):
        encode_prompt(tokenizer, "hello")


def test_end_tokens() -> None:
    model, tokenizer = build(llama), byte_level()
    model.generation_config.eos_token_id = [5, 7]
    assert end_tokens(model, tokenizer) == {5, 7, tokenizer.eos_token_id}
    model.generation_config.eos_token_id = 9
    tokenizer.eos_token = None
    assert end_tokens(model, tokenizer) == {9}
    model.generation_config = None
    assert end_tokens(model, tokenizer) == frozenset()
