"""Tiny random models with tiny real tokenizers, in folders as the Hub has them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from quantlab.models import LoadedModel, load

ROWS = 640
"""Rows of the embedding; the tokenizers have fewer tokens."""

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
UNKNOWN = r"\p{Lu}?\p{Ll}+|\p{N}{2}|[^\p{L}]"
"""A way to split that llama.cpp does not have."""

TEXTS = sorted((Path(__file__).parents[2] / "assets" / "texts").glob("*.txt"))


def corpus() -> Iterator[str]:
    for path in TEXTS:
        yield path.read_text(encoding="utf-8")[:30_000]
    yield "We'll see 2024, 3.14159 and 1000000 naïve cafés in Москва, 東京は日本の首都です。 " * 20
    yield "  for (int i = 0; i < 10; ++i) {\n\t\tx[i] += 1;\n  }\n\n\n    done  " * 20


def splitter(kind: str) -> Any:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    with_regex = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if kind == "gpt-2":
        return with_regex
    if kind == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), with_regex])
    pattern = {"qwen2": QWEN2, "llama-bpe": LLAMA3, "unknown": UNKNOWN}[kind]
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, byte_level])


def byte_level_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that splits text as `kind` does."""
    tokenizer = Tokenizer(BPE(ignore_merges=kind == "llama-bpe"))
    tokenizer.pre_tokenizer = splitter(kind)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|endoftext|>"]
    trainer = BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    if kind == "llama-bpe":
        begin = special[0]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=special[1],
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE tokenizer with byte fallback, in the form Llama 2's has in its tokenizer.json."""
    special = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(corpus(), BpeTrainer(vocab_size=340, show_progress=False))
    document = json.loads(trained.to_str())["model"]
    merged = ["".join(pair) for pair in document["merges"]]
    letters = [token for token in document["vocab"] if token not in merged]
    tokens = [*special, *byte_tokens, *dict.fromkeys(merged), *letters]
    vocab = {token: index for index, token in enumerate(tokens)}
    # As in a converted SentencePiece model: every pair whose joint is a piece is a merge.
    merges = [
        (piece[:cut], piece[cut:])
        for piece in dict.fromkeys(merged)
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def phi3_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's, with the end token that llama.cpp looks up in models of this name."""
    tokenizer = sentencepiece_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    return tokenizer


COMMON: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
}
GPT2: dict[str, Any] = {
    "vocab_size": ROWS,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
OPT: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 64,
    "max_position_embeddings": 256,
}
NEOX: dict[str, Any] = {
    **{key: value for key, value in COMMON.items() if key != "num_key_value_heads"},
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
}
GEMMA: dict[str, Any] = {**COMMON, "head_dim": 16, "pad_token_id": 1}
GEMMA2: dict[str, Any] = {**GEMMA, "query_pre_attn_scalar": 16, "sliding_window": 24}
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, COMMON),
    "mistral": (MistralConfig, COMMON),
    "qwen2": (Qwen2Config, COMMON),
    "qwen3": (Qwen3Config, {**COMMON, "head_dim": 32}),
    "smollm3": (SmolLM3Config, {**COMMON, "num_hidden_layers": 5, "pad_token_id": 1}),
    "gemma": (GemmaConfig, GEMMA),
    "gemma2": (Gemma2Config, GEMMA2),
    "gemma3": (Gemma3TextConfig, {**GEMMA2, "num_hidden_layers": 7}),
    "phi3": (Phi3Config, {**COMMON, "tie_word_embeddings": False, "pad_token_id": 1}),
    "neox": (GPTNeoXConfig, NEOX),
    "gpt2": (GPT2Config, GPT2),
    "opt": (OPTConfig, OPT),
}

Make = Callable[..., LoadedModel]


@pytest.fixture(scope="session")
def tokenizer_of() -> Callable[[str], PreTrainedTokenizerFast]:
    """By llama.cpp's name of the pre-tokenizer, 'sentencepiece' or 'unknown'; made once."""
    made: dict[str, PreTrainedTokenizerFast] = {}

    def get(kind: str) -> PreTrainedTokenizerFast:
        if kind not in made:
            others = {"sentencepiece": sentencepiece_tokenizer, "phi3": phi3_tokenizer}
            made[kind] = others[kind]() if kind in others else byte_level_tokenizer(kind)
        return made[kind]

    return get


@pytest.fixture
def make(tmp_path: Path, tokenizer_of: Callable[[str], PreTrainedTokenizerFast]) -> Make:
    """`make(family, tokenizer, **config) -> LoadedModel`, from a folder of its own.

    Weights are large enough for attention to depend on positions and for logits to spread.
    """

    def build(family: str, tokenizer: str = "", **changes: Any) -> LoadedModel:
        tokenizer = tokenizer or ("phi3" if family == "phi3" else "gpt-2")
        cls, common = CONFIGS[family]
        config = cls(**{**common, **changes})
        torch.manual_seed(7)
        module = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                noise = torch.randn(parameter.shape)
                norm = parameter.dim() == 1 and name.endswith("weight")
                parameter.copy_(1 + 0.2 * noise if norm else 0.15 * noise)
        folder = tmp_path / family
        module.save_pretrained(folder)
        tokenizer_of(tokenizer).save_pretrained(folder)
        return load(str(folder))

    return build
