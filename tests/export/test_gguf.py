"""GGUF files against llama.cpp, which loads them: logits, tokens, bytes, and what is refused."""

from __future__ import annotations

import math
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from tokenizers import Tokenizer, processors
from tokenizers.models import BPE, Unigram
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from quantlab.blockwise import quantize_blocks, quantize_outer
from quantlab.errors import ConfigError, ModelError
from quantlab.export import gguf, gguf_tokenizer
from quantlab.export.gguf_header import read_header
from quantlab.export.gguf_tokenizer import CANDIDATES, PROBE, llama_tokens
from quantlab.ggml import FORMATS
from quantlab.ggml.mixes import FILE_TYPES
from quantlab.methods import METHODS
from quantlab.models import LoadedModel, block_list, get_block, load
from quantlab.packing import AffineWeight, GGMLWeight, PackedWeight, affine

from .conftest import ROWS, TEXTS, Make

Packed = dict[str, PackedWeight]

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


@torch.no_grad()
def pack(model: LoadedModel, file_type: str) -> tuple[Packed, Packed]:
    """Quantize as the method does and put the dequantized weights into the module."""
    method = METHODS["gguf"]
    config = method.Config(type=file_type)
    packed: Packed = {}
    for index in range(len(block_list(model.module, model.family))):
        block = get_block(model.module, model.family, index)
        for path, weight in method.quantize_block(block, {}, config).items():
            block.linears[path].weight.copy_(weight.dequantize())
            packed[f"{model.family.blocks}.{index}.{path}"] = weight
    outer = quantize_outer(model, method, config)
    model.module.get_input_embeddings().weight.copy_(outer["token_embd"].dequantize())
    if "output" in outer:
        model.module.get_output_embeddings().weight.copy_(outer["output"].dequantize())
    return packed, outer


def torch_logits(model: LoadedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.module(ids[None]).logits[0].float()


@contextmanager
def opened(path: Path, context: int = 256) -> Iterator[llama_cpp.Llama]:
    """In llama.cpp with float32 keys and values, one thread, logits of every token."""
    llama = llama_cpp.Llama(
        str(path),
        n_ctx=context,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=FORMATS["f32"].type_id,
        type_v=FORMATS["f32"].type_id,
        verbose=False,
    )
    try:
        yield llama
    finally:
        llama.close()


def llama_logits(path: Path, ids: Tensor) -> Tensor:
    with opened(path, len(ids)) as llama:
        llama.eval(ids.tolist())
        return torch.from_numpy(np.asarray(llama.scores[: len(ids)]).copy())


def window(length: int = 160) -> Tensor:
    return torch.randint(2, ROWS, (length,), generator=torch.Generator().manual_seed(3))


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference over that of the logits about their mean."""
    spread = (wanted - wanted.mean(-1, keepdim=True)).square().mean().sqrt()
    return float((found - wanted).square().mean().sqrt() / spread)


def field(path: Path, key: str) -> Any:
    found = GGUFReader(str(path)).get_field(key)
    return None if found is None else found.contents()


MODELS = {
    "llama": ("llama", {}),
    "llama untied": ("llama", {"tie_word_embeddings": False}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with wide heads": ("llama", {"head_dim": 32}),
    "llama with llama3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama with linear rope": ("llama", {"rope_parameters": LINEAR}),
    "llama with yarn": ("llama", {"rope_parameters": YARN}),
    "llama with hot yarn": ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.4}}),
    "mistral": ("mistral", {"tie_word_embeddings": False}),
    "qwen2": ("qwen2", {}),
    "qwen2 with yarn": ("qwen2", {"rope_parameters": YARN}),
    "gpt2": ("gpt2", {}),
    "gpt2 untied": ("gpt2", {"tie_word_embeddings": False, "n_inner": 96}),
}


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same_from_a_float_file(
    name: str, make: Make, tmp_path: Path
) -> None:
    """Both work in float32: what remains is the order of sums, a few units of 2^-24 a step and some
    hundred steps. ggml reads GELU from a table of float16, so GPT-2 may be off by its 2^-11."""
    family, config = MODELS[name]
    model = make(family, **config)
    packed, outer = pack(model, "f32")
    gguf.check(model)
    path = gguf.write(tmp_path / "model.gguf", model, packed, outer, "f32")
    ids = window()
    error = relative_error(llama_logits(path, ids), torch_logits(model, ids))
    assert error < (2**-10 if family == "gpt2" else 2**-16)
    names = set(gguf.read(path))
    assert ("output.weight" in names) == (config.get("tie_word_embeddings") is False)


@pytest.mark.parametrize(
    ("family", "file_type"),
    [
        ("llama", "q8_0"),
        ("gpt2", "q8_0"),
        ("qwen2", "q4_0"),
        ("llama", "q4_k_m"),
        ("llama", "iq4_nl"),
        ("llama", "bf16"),
        ("llama", "f16"),
    ],
)
def test_llama_cpp_computes_the_same_from_quantized_blocks(
    family: str, file_type: str, make: Make, tmp_path: Path
) -> None:
    """llama.cpp also rounds the inputs of every linear to 8 bits: by m / 254 at most, where m is
    the largest of 32 or 256 inputs, some 2 to 3 times their rms: rms 0.5 to 0.7% of it. Three
    blocks with four such roundings in a row and a head add up to 2.5% of the logits; twice that
    covers what softmax and products amplify. A wrong row order is off by 100%."""
    width = {"n_embd": 256} if family == "gpt2" else {"hidden_size": 256, "intermediate_size": 256}
    model = make(family, **width)
    scale = math.sqrt(64 / 256)  # as strong as the narrow models
    for parameter in model.module.parameters():
        if parameter.dim() > 1:
            parameter.mul_(scale)
    packed, outer = pack(model, file_type)
    path = gguf.write(tmp_path / "model.gguf", model, packed, outer, file_type)
    ids = window()
    error = relative_error(llama_logits(path, ids), torch_logits(model, ids))
    print(family, file_type, error)
    assert error < 0.05


def test_what_is_read_is_what_was_written(make: Make, tmp_path: Path) -> None:
    """Exact bytes; q and k in ggml's row order, spelled out here for heads of 16 channels."""
    model = make("llama", tie_word_embeddings=False)
    packed, outer = pack(model, "q4_k_m")
    path = gguf.write(tmp_path / "model.gguf", model, packed, outer, "q4_k_m")
    found = gguf.read(path)

    def same(name: str, weight: PackedWeight, rows: list[int] | slice = slice(None)) -> None:
        assert isinstance(weight, GGMLWeight)
        assert (found[name].type, found[name].columns) == (weight.type, weight.columns)
        assert torch.equal(found[name].data, weight.data[rows])

    head = [row for pair in range(8) for row in (pair, pair + 8)]
    for index in range(3):
        at = f"model.layers.{index}"
        queries = [16 * number + row for number in range(4) for row in head]
        same(f"blk.{index}.attn_q.weight", packed[f"{at}.self_attn.q_proj"], queries)
        same(f"blk.{index}.attn_k.weight", packed[f"{at}.self_attn.k_proj"], queries[:32])
        same(f"blk.{index}.attn_v.weight", packed[f"{at}.self_attn.v_proj"])
        same(f"blk.{index}.attn_output.weight", packed[f"{at}.self_attn.o_proj"])
        same(f"blk.{index}.ffn_gate.weight", packed[f"{at}.mlp.gate_proj"])
        same(f"blk.{index}.ffn_up.weight", packed[f"{at}.mlp.up_proj"])
        same(f"blk.{index}.ffn_down.weight", packed[f"{at}.mlp.down_proj"])
        norm = model.module.model.layers[index].input_layernorm.weight
        assert torch.equal(found[f"blk.{index}.attn_norm.weight"].dequantize()[0], norm)
    same("token_embd.weight", outer["token_embd"])
    same("output.weight", outer["output"])
    assert gguf.weight_bytes(path) == sum(weight.nbytes for weight in found.values())
    assert len(found) == 3 * 9 + 3


def test_header_agrees_with_the_gguf_package(make: Make, tmp_path: Path) -> None:
    model = make("llama", rope_parameters=LLAMA3_ROPE)
    path = gguf.write(tmp_path / "model.gguf", model, *pack(model, "q8_0"), "q8_0")
    header, reader = read_header(path), GGUFReader(str(path))
    for key, found in header.fields.items():
        wanted = reader.get_field(key)
        assert wanted is not None
        assert [int(kind) for kind in wanted.types[:1] + wanted.types[-1:]] == [
            found.kind,
            found.inner,
        ]
        contents = wanted.contents() if found.kind == 9 else [wanted.contents()]
        values = [value.decode() if isinstance(value, bytes) else value for value in found.values]
        assert values == contents
    assert len(header.fields) + 3 == len(reader.fields)  # the reader counts version and sizes
    assert list(header.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        info = header.tensors[tensor.name]
        assert info.shape == tuple(tensor.shape)
        assert (info.type_id, info.start, info.size) == (
            int(tensor.tensor_type),
            int(tensor.data_offset),
            int(tensor.n_bytes),
        )


def test_metadata(make: Make, tmp_path: Path) -> None:
    model = make("mistral", "llama-bpe", sliding_window=96, head_dim=32)
    path = gguf.write(tmp_path / "model.gguf", model, *pack(model, "q4_k_s"), "q4_k_s")
    wanted = {
        "general.architecture": "llama",
        "general.name": "mistral",
        "general.file_type": FILE_TYPES["q4_k_s"].ftype,
        "general.quantization_version": 2,
        "llama.block_count": 3,
        "llama.context_length": 96,  # llama.cpp sees everything: equal within the window only
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": ROWS,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": model.tokenizer.chat_template,
    }
    assert {key: field(path, key) for key in wanted} == wanted
    epsilon = field(path, "llama.attention.layer_norm_rms_epsilon")
    assert epsilon == pytest.approx(model.module.config.rms_norm_eps)
    tokens, types = field(path, "tokenizer.ggml.tokens"), field(path, "tokenizer.ggml.token_type")
    assert len(model.tokenizer) < len(tokens) == len(types) == ROWS
    assert (types[0], types[5], types[-1], tokens[-1]) == (3, 1, 5, f"[PAD{ROWS - 1}]")


def test_quantized_layers_in_place_give_the_same_file(make: Make, tmp_path: Path) -> None:
    """As in a comparison: the module holds QuantLinears, whose biases and weights are written."""
    model = make("qwen2")
    plain = gguf.write(tmp_path / "plain.gguf", model, *pack(model, "q8_0"), "q8_0")
    method = METHODS["gguf"]
    config = method.Config(type="q8_0")
    packed = quantize_blocks(model, method, config, None, lambda done, total: None)
    outer = quantize_outer(model, method, config)
    assert plain.read_bytes() == _written(tmp_path / "a.gguf", model, packed, outer)
    assert plain.read_bytes() == _written(tmp_path / "b.gguf", model, {}, outer)


def _written(path: Path, model: LoadedModel, packed: Packed, outer: Packed) -> bytes:
    return gguf.write(path, model, packed, outer, "q8_0").read_bytes()


# --- tokenizers --------------------------------------------------------------------------------

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
        assert (llama.token_bos(), llama.token_eos()) == (
            model.tokenizer.bos_token_id,
            model.tokenizer.eos_token_id,
        )


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


# --- refusals ----------------------------------------------------------------------------------

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
    "wide heads": ("qwen2", {"head_dim": 32}, "no heads of 32, only heads of 16"),
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


# --- files -------------------------------------------------------------------------------------


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
        (data[:-100], r"bad\.gguf is truncated: \d+ of \d+ bytes"),
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


# --- the bundled model -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("home")
def test_bundled_model_as_q8_0(tmp_path: Path) -> None:
    """It loads, reads text as before, knows Paris, and has torch's perplexity."""
    model = load("bundled")
    gguf.check(model)
    packed, outer = pack(model, "q8_0")
    path = gguf.write(tmp_path / "model.gguf", model, packed, outer, "q8_0")
    assert path.stat().st_size < 1.1 * gguf.weight_bytes(path)
    assert model.gguf is not None
    source, copy = read_header(model.gguf).fields, read_header(path).fields
    kept = [key for key in source if key.startswith(("tokenizer.", "general.license"))]
    assert len(kept) > 10
    assert {key: copy[key] for key in kept} == {key: source[key] for key in kept}
    prose = TEXTS[-1].read_text(encoding="utf-8")
    ids = model.tokenizer(prose, verbose=False).input_ids
    assert llama_tokens(path, [prose]) == [ids]
    piece = torch.tensor(ids[:256])
    with opened(path) as llama:
        llama.eval(piece.tolist())
        found = torch.from_numpy(np.asarray(llama.scores[: len(piece)]).copy())
        answer = llama("The capital of France is", max_tokens=8, temperature=0)
    assert "Paris" in answer["choices"][0]["text"]
    perplexities = [
        float(torch.nn.functional.cross_entropy(logits[:-1], piece[1:]).exp())
        for logits in (found, torch_logits(model, piece))
    ]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=0.01)
    assert perplexities[1] < 60
