"""Tokenizers in GGUF files: llama.cpp reads every text as transformers does, or is not written."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import processors

from quantlab.errors import ModelError
from quantlab.export import gguf, gguf_tokenizer
from quantlab.export.gguf_tokenizer import CANDIDATES, PROBE, llama_tokens
from quantlab.models import bundled, load, locate
from quantlab.models.loading import load_tokenizer_of

from .conftest import TEXTS, Make
from .oracle import field, opened, pack

TRICKY = (
    "",
    " ",
    "a  2   b\t\t3\n 4",
    "I'm you'RE he'D it's 'tis o'clock 'LL",
    "12345678901234567890 1,000,000.5 \u0663\u0664 \u00bd \u2167 x\u00b2",
    "Zażółć gęślą jaźń — ŁÓDŹ, Größe, Ελλάδα, Привет-мир, עברית, العربية, हिन्दी, ไทย, 한국어",
    "中文字符。全角\uff0c标点\uff01「かぎ」 東京2025年",
    "👩‍👩‍👧 🏳️‍🌈 e\u0301 \u200b\u00a0\u3000x\u2028y \ufeff",
    "x==y&&!z||(a<<2)>=b;//c\r\n\r\n\tif(){}\r  ",
    "\x00\x01\x7f control",
    "   leading, trailing   \n\n\n   \n",
    "▁ already visible ▁▁ spaces",
)
KINDS = ("gpt-2", "smollm", "qwen2", "llama-bpe", "sentencepiece")


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_agree(kind: str, make: Make, tmp_path: Path) -> None:
    model = make("llama", kind)
    path = gguf.write(tmp_path / "model.gguf", model, *pack(model, "q8_0"), "q8_0")
    prose = TEXTS[-1].read_text(encoding="utf-8")[-20_000:]
    texts = [*TRICKY, *PROBE, prose]
    wanted = [model.tokenizer(text, verbose=False).input_ids for text in texts]
    assert llama_tokens(path, texts) == wanted
    expected = "default" if kind == "sentencepiece" else kind
    assert field(path, "tokenizer.ggml.pre") == expected
    # What a person calls: Llama.tokenize adds the begin token as the file says.
    with opened(path) as llama:
        assert llama.tokenize(prose.encode(), add_bos=True) == wanted[-1]
        foreign = TRICKY[5].encode()
        assert llama.detokenize(llama.tokenize(foreign, add_bos=False)).strip() == foreign
        assert (llama.token_bos(), llama.token_eos()) == (
            model.tokenizer.bos_token_id,
            model.tokenizer.eos_token_id,
        )


@pytest.mark.parametrize("kind", KINDS[:4])
def test_a_file_read_back_splits_as_it_says(kind: str, make: Make, tmp_path: Path) -> None:
    """transformers reads the vocabulary of a GGUF file and not the rules it names."""
    model = make("llama", kind)
    path = gguf.write(tmp_path / "model.gguf", model, *pack(model, "q8_0"), "q8_0")
    again = load(str(path)).tokenizer
    texts = [*TRICKY, *PROBE]
    plain = [again(text, add_special_tokens=False).input_ids for text in texts]
    assert plain == [model.tokenizer(text, add_special_tokens=False).input_ids for text in texts]


@pytest.mark.slow
@pytest.mark.xdist_group("bundled")
def test_the_bundled_tokenizer_reads_as_llama_cpp_does() -> None:
    tokenizer = load_tokenizer_of(locate("bundled"))
    texts = [*TRICKY, *PROBE]
    wanted = llama_tokens(bundled.find_gguf(), texts)
    assert [tokenizer(text, verbose=False).input_ids for text in texts] == wanted


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (kind, wrong)
        for kind in KINDS[:4]
        for wrong in CANDIDATES
        # Without merges of digits, three at a time and one at a time are the same.
        if wrong != kind and (kind, wrong) != ("qwen2", "llama-bpe")
    ],
)
def test_wrong_rules_are_caught(
    kind: str, wrong: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("llama", kind)
    gguf.check(model)
    for steps in gguf_tokenizer.PRE_TOKENIZERS:
        monkeypatch.setitem(gguf_tokenizer.PRE_TOKENIZERS, steps, wrong)
    with pytest.raises(ModelError, match=f"with rules '{wrong}', llama.cpp reads text differently"):
        gguf.check(model)


def test_rules_not_in_the_table_are_found_by_trying(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = make("llama", "smollm")
    monkeypatch.setattr(gguf_tokenizer, "PRE_TOKENIZERS", {})
    path = gguf.write(tmp_path / "model.gguf", model, *pack(model, "q8_0"), "q8_0")
    assert field(path, "tokenizer.ggml.pre") == "smollm"


def test_rules_that_llama_cpp_does_not_have_are_refused(make: Make) -> None:
    with pytest.raises(ModelError, match=r"any of the rules gpt-2, llama-bpe, .* not") as caught:
        gguf.check(make("llama", "unknown"))
    assert caught.value.hint is not None


def test_added_tokens_are_whole(make: Make, tmp_path: Path) -> None:
    """Special ones are parsed where asked, others always; a begin and an end are put around."""
    model = make("llama", "gpt-2")
    model.tokenizer.add_tokens(["<tool>"])
    model.tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    begin, end = model.tokenizer.bos_token_id, model.tokenizer.eos_token_id
    model.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A <|endoftext|>",
        special_tokens=[("<|begin_of_text|>", begin), ("<|endoftext|>", end)],
    )
    path = gguf.write(tmp_path / "model.gguf", model, *pack(model, "q8_0"), "q8_0")
    types = field(path, "tokenizer.ggml.token_type")
    tool, user = model.tokenizer.convert_tokens_to_ids(["<tool>", "<|user|>"])
    assert (types[tool], types[user]) == (4, 3)
    assert field(path, "tokenizer.ggml.add_bos_token")
    assert field(path, "tokenizer.ggml.add_eos_token")
    text = "use <tool> now"
    assert llama_tokens(path, [text]) == [model.tokenizer(text).input_ids]
    text += "<|user|>"
    with opened(path) as llama:
        wanted = model.tokenizer(text, add_special_tokens=False).input_ids
        assert llama.tokenize(text.encode(), add_bos=False, special=True) == wanted
