"""What a GGUF file cannot say is refused before work begins; failures leave no half file."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerFast

from quantlab.errors import ConfigError, ModelError
from quantlab.export import gguf, gguf_tokenizer
from quantlab.packing import AffineWeight, affine

from .conftest import Make
from .oracle import LLAMA3_ROPE, YARN, pack

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no architecture": ("opt", {}, "llama.cpp has no OPT architecture"),
    "activation": ("llama", {"hidden_act": "gelu"}, "no activation gelu, only silu"),
    "exact gelu": ("gpt2", {"activation_function": "gelu"}, "only gelu_new"),
    "attention by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scaled by layer"),
    "attention unscaled": ("gpt2", {"scale_attn_weights": False}, "without scaling"),
    "rope": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "no dynamic rope scaling, only linear, llama3 and yarn",
    ),
    "llama3 rope": ("qwen2", {"rope_parameters": LLAMA3_ROPE}, "no llama3 rope scaling"),
    "partial rope": (
        "llama",
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "no partial rope",
    ),
    "yarn": ("llama", {"rope_parameters": {**YARN, "beta_fast": 16.0}}, "yarn with beta_fast=16.0"),
    "wide heads": ("qwen2", {"head_dim": 32}, "no heads of another width"),
    "biases": (
        "qwen3",
        {"attention_bias": True},
        "qwen3 architecture has no place for .*q_proj.bias",
    ),
    "no biases": ("neox", {"attention_bias": False}, "no linears without bias, such as gpt_neox"),
    "gemma untied": ("gemma2", {"tie_word_embeddings": False}, "only tied ones"),
    "gemma's scale": ("gemma2", {"query_pre_attn_scalar": 8}, "only the width of a head"),
    "gemma's windows": ("gemma3", {"layer_types": ["sliding_attention"] * 7}, "but each 6th"),
    "gemma's caps": ("gemma2", {"attn_logit_softcapping": None}, "only both capped"),
    "gemma 3's caps": ("gemma3", {"final_logit_softcapping": 30.0}, "no soft caps"),
    "gemma both ways": ("gemma3", {"use_bidirectional_attention": True}, "only causal attention"),
    "gemma's local rope": (
        "gemma3",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            }
        },
        "only one with base 10000",
    ),
    "smollm3's rope": ("smollm3", {"no_rope_layers": [1, 0, 1, 0, 1]}, "only each 4th"),
    "phi3's long rope": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 128,
                "factor": 2.0,
            }
        },
        "no longrope rope scaling, only linear",
    ),
    "rows": ("llama", {"vocab_size": 300}, "has 600 tokens, its embedding only 300 rows"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_expressed_is_refused(case: str, make: Make, tmp_path: Path) -> None:
    family, config, message = REFUSED[case]
    model = make(family, **config)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ModelError, match=message):
        gguf.check(model)
    with pytest.raises(ModelError, match=message):
        gguf.write(tmp_path / "model.gguf", model, {}, {}, "f32")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_weight_without_a_place_is_refused(make: Make) -> None:
    model = make("llama")
    model.module.model.layers[1].self_attn.q_norm = torch.nn.LayerNorm(16)
    with pytest.raises(ModelError, match=r"no place for model.layers.1.self_attn.q_norm.weight"):
        gguf.check(model)


def test_other_tokenizers_are_refused(make: Make) -> None:
    model = make("llama")
    model.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    )
    with pytest.raises(ModelError, match="BPE tokenizers, not Unigram"):
        gguf.check(model)
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE({"a": 0}, [])))
    with pytest.raises(ModelError, match="neither on bytes nor falls back"):
        gguf.check(model)
    model.tokenizer = object()
    with pytest.raises(ModelError, match=r"no tokenizer\.json form"):
        gguf.check(model)


def test_a_model_without_an_end_is_refused(make: Make) -> None:
    model = make("llama")
    model.tokenizer.eos_token = None
    gguf.check(model)  # the configuration names it
    model.module.config.eos_token_id = None
    with pytest.raises(ModelError, match="names no end-of-text token"):
        gguf.check(model)


def test_only_ggml_blocks_go_into_a_file(make: Make, tmp_path: Path) -> None:
    model = make("llama")
    packed, outer = pack(model, "q8_0")
    path = "model.layers.0.mlp.up_proj"
    other = affine(torch.zeros(96, 64), torch.ones(96, 1), None, 4, 64)
    assert isinstance(other, AffineWeight)
    with pytest.raises(ConfigError, match=f"{path} is AffineWeight"):
        gguf.write(tmp_path / "model.gguf", model, {**packed, path: other}, outer, "q8_0")
    with pytest.raises(ConfigError, match="type: unknown 'q9'"):
        gguf.write(tmp_path / "model.gguf", model, packed, outer, "q9")
    assert not list(tmp_path.glob("model.gguf*"))


def test_a_disk_that_fills_up_leaves_what_was_there(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operating system refuses to write beyond a size, in the tensors and in the header."""
    model = make("llama")
    packed, outer = pack(model, "q8_0")
    path = gguf.write(tmp_path / "model.gguf", model, packed, outer, "q8_0")
    before = path.read_bytes()
    names = sorted(tmp_path.iterdir())
    # The probe's file would meet the limit first.
    monkeypatch.setattr(gguf_tokenizer, "_difference", lambda *_: None)
    for limit in (len(before) - 5000, 100):
        with largest_file(limit), pytest.raises(OSError, match="File too large"):
            gguf.write(path, model, packed, outer, "q8_0")
        assert path.read_bytes() == before
        assert sorted(tmp_path.iterdir()) == names


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_damaged_files_are_told(make: Make, tmp_path: Path) -> None:
    model = make("llama")
    path = gguf.write(tmp_path / "model.gguf", model, *pack(model, "q8_0"), "q8_0")
    data = path.read_bytes()
    bad = tmp_path / "bad.gguf"
    for content, message in (
        (data[:-100], r"bad\.gguf is a corrupt or truncated GGUF file \(\d+ of \d+ bytes\)"),
        (data[:1000], "corrupt or truncated"),
        (b"GGUF", "corrupt or truncated"),
        (data[:4] + b"\x09" + data[5:], "GGUF version 9"),
        (b"PK\x03\x04" + data[4:], "is not a GGUF file"),
        (b"", "is not a GGUF file"),
    ):
        bad.write_bytes(content)
        for function in (gguf.read, gguf.weight_bytes):
            with pytest.raises(ModelError, match=message):
                function(bad)
