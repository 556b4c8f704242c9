"""The native decoder against transformers' modules in float64, every family, every way of reading.

How far float32 may take the logits is measured on the float64 module: each step gets the largest
error that float32 (or a product on AMX tiles) can make there, with random signs. To first order the
logits' error is a sum of such terms, so with s its root mean square over some draws, more than 8 s
has a probability below 2 exp(-32) (Hoeffding 1963, theorem 2).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kernels import native, reference
from quantlab.engine import Session
from quantlab.errors import ConfigError
from quantlab.ggml import quantize_rows
from quantlab.layers import QuantEmbedding, QuantLinear, replace_linear
from quantlab.methods.w8a8 import pack_int8
from quantlab.models import load
from quantlab.native_decoder import CHUNK, NativeDecoder, NativeSession
from quantlab.native_records import FAMILIES, linears_of, refusal
from quantlab.outer import round_outer
from quantlab.packing import Activation, GGMLWeight
from tests import tiny

U = 2.0**-24
TILE = 2.0**-16
"""A product on AMX tiles, per term; tests/kernels/native_bounds.py."""

LENGTH = 40
WINDOW = 8

SHAPE: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "bos_token_id": tiny.BOS,
    "eos_token_id": tiny.EOS,
    "pad_token_id": tiny.EOS,
    "attn_implementation": "eager",
}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]


def raw(name: str, **changes: Any) -> Any:
    """Sizes that are no multiples of 32, and every option of the family switched on."""
    shape = SHAPE | {"tie_word_embeddings": name.startswith("gemma")} | changes
    gemma = shape | {"query_pre_attn_scalar": 24, "sliding_window": WINDOW, "layer_types": KINDS}
    match name:
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**shape, attention_bias=True, mlp_bias=True))
        case "mistral":
            return MistralForCausalLM(MistralConfig(**shape, sliding_window=WINDOW))
        case "qwen2":
            del shape["head_dim"]
            windows = {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": KINDS}
            return Qwen2ForCausalLM(Qwen2Config(**shape, **windows))
        case "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(**shape))
        case "gemma":
            return GemmaForCausalLM(GemmaConfig(**shape))
        case "gemma2":
            caps = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}
            return Gemma2ForCausalLM(Gemma2Config(**gemma, **caps))
        case "gemma3_text":
            return Gemma3ForCausalLM(Gemma3TextConfig(**gemma))
    raise ValueError(name)


def bfloat16_model(name: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """Weights in bfloat16; buffers (rotation frequencies) stay float32, as after loading."""
    module = raw(name, **changes).eval().requires_grad_(False)
    tiny.randomize(module, seed)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return module


def in_float64(module: Any) -> Any:
    """The same numbers. A scale of the embedding is rounded to bfloat16, as bfloat16 models do."""
    wide = copy.deepcopy(module)
    for child in list(wide.modules()):
        if isinstance(scale := getattr(child, "embed_scale", None), Tensor):
            child.embed_scale = scale.to(torch.bfloat16)
    for path, child in list(wide.named_modules()):
        if isinstance(child, QuantLinear | QuantEmbedding):
            replace_linear(wide, path, plain_layer(child))
    return wide.double()


def plain_layer(layer: QuantLinear | QuantEmbedding) -> nn.Module:
    weight = layer.weight_packed
    values = weight.dequantize()
    if isinstance(layer, QuantEmbedding):
        return nn.Embedding(*values.shape, _weight=values)
    linear: nn.Linear = nn.Linear(*reversed(values.shape), bias=layer.bias is not None)
    if getattr(weight, "activation", None) is not None:
        linear = RoundedInput(*reversed(values.shape), bias=layer.bias is not None)
    linear.weight.data = values
    if layer.bias is not None:
        linear.bias.data = layer.bias
    return linear.requires_grad_(False)


class RoundedInput(nn.Linear):
    """The meaning of W8A8 per token, in the dtype of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        codes, steps = reference.quantize_rows(x)
        return super().forward(codes * steps)


@contextmanager
def rounding_errors(module: Any, tile: float) -> Iterator[None]:
    """Every forward pass makes the errors that float32 could make, with random signs."""
    handles = []
    seen: dict[str, float] = {}

    def signed(size: Tensor) -> Tensor:
        return size * (torch.randint(0, 2, size.shape) * 2 - 1)

    def linear(layer: nn.Linear, args: tuple[Tensor], y: Tensor) -> Tensor:
        size = args[0].abs() @ layer.weight.abs().T
        return y + signed(((layer.in_features + 16) * U + tile) * size)

    def norm(_: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
        return y + signed((y.shape[-1] / 2 + 8) * U * y.abs())

    def activation(_: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
        return y + signed(16 * U * args[0].abs())

    def embedding(_: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
        return y + signed(2 * U * y.abs())

    def attention(block: Any) -> None:
        head_dim, scale = block.head_dim, block.scaling

        def largest(name: str, part: str) -> Any:
            def hook(_: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
                heads = y.reshape(-1, head_dim)
                size = heads.abs().max() if part == "v" else heads.norm(dim=-1).max()
                seen[part] = float(size)

            return block.get_submodule(name).register_forward_hook(hook)

        normed = getattr(block, "q_norm", None) is not None
        for part in ("q", "k"):
            handles.append(largest(f"{part}_norm" if normed else f"{part}_proj", part))
        handles.append(largest("v_proj", "v"))

        def values(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            # Scores are off by (d + 8) u |q| |k| scale, and their exponentials by as much of
            # themselves; so are the sums of both, and then the mean of the values.
            scores = (head_dim + 8) * U * seen["q"] * seen["k"] * scale
            size = 2 * (scores + (LENGTH + 16) * U) * seen["v"]
            return (args[0] + signed(torch.full_like(args[0], size)),)

        handles.append(block.o_proj.register_forward_pre_hook(values))

    for child in module.modules():
        if isinstance(child, nn.Linear):
            handles.append(child.register_forward_hook(linear))
        elif isinstance(child, nn.Embedding):
            handles.append(child.register_forward_hook(embedding))
        elif type(child).__name__.endswith("RMSNorm"):
            handles.append(child.register_forward_hook(norm))
        elif hasattr(child, "o_proj"):
            attention(child)
        elif hasattr(child, "act_fn"):
            handles.append(child.act_fn.register_forward_hook(activation))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def exact_and_bound(module: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [length, vocabulary] of the float64 module, and how far the native ones may be."""
    wide = in_float64(module)
    want = tiny.logits(wide, ids[None])[0]
    amx = native.native().level.name == "amx"
    torch.manual_seed(0)
    with rounding_errors(wide, TILE if amx else 0.0):
        draws = torch.stack([tiny.logits(wide, ids[None])[0] - want for _ in range(8)])
    # The logits' cap is a tanh of float32.
    return want, 8 * draws.square().mean((0, 2))[:, None].sqrt() + 8 * U * want.abs()


def assert_close(found: Tensor, want: Tensor, bound: Tensor) -> None:
    over = ((found.double() - want).abs() / bound).max()
    assert bool(over <= 1), f"{float(over):.3g} times the bound {float(bound.max()):.3g}"


PARTS = ([LENGTH], [17, 3, 1, 19], [1] * LENGTH, [5, 35])
"""At once, in parts (on tiles and not), token by token."""


def read_in_parts(decoder: NativeDecoder, ids: Tensor, parts: list[int], every: bool) -> Tensor:
    found, first = [], 0
    for part in ids.split(parts):
        token, logits = decoder.read(part.tolist(), first, every=every)
        assert logits.shape == (len(part) if every else 1, tiny.VOCABULARY)
        assert token == int(logits[-1].argmax())
        found.append(logits)
        first += len(part)
    return torch.cat(found)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def check(module: Any, seed: int = 1) -> None:
    ids = tiny.token_ids(1, LENGTH, seed)[0]
    want, bound = exact_and_bound(module, ids)
    assert float(bound.max()) < 0.05 * float(want.std()), "a bound that sees nothing"
    for parts in PARTS:
        decoder = NativeDecoder(module, LENGTH)
        assert_close(read_in_parts(decoder, ids, parts, every=True), want, bound)
    # The cache is written over, and only last logits are asked for.
    ends = torch.tensor(PARTS[1]).cumsum(0) - 1
    last = read_in_parts(decoder, ids, PARTS[1], every=False)
    assert_close(last, want[ends], bound[ends])


def test_every_family(family: str) -> None:
    check(bfloat16_model(family))


@pytest.mark.xdist_group("native")
def test_every_level(level: str) -> None:
    for name in ("qwen3", "gemma2"):
        check(bfloat16_model(name, seed=3))


def test_threads_do_not_change_a_bit() -> None:
    module = bfloat16_model("gemma2", seed=4)
    ids = tiny.token_ids(1, LENGTH)[0]
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(read_in_parts(NativeDecoder(module, LENGTH), ids, PARTS[1], every=True))
    torch.set_num_threads(before)
    assert torch.equal(*found)


def scaled_rotations() -> list[dict[str, Any]]:
    llama3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return [
        {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4},
        {
            "rope_type": "llama3",
            **llama3,
            "original_max_position_embeddings": 32,
            "rope_theta": 1e4,
        },
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_theta": 1e4,
        },
    ]


@pytest.mark.parametrize("rope", scaled_rotations(), ids=lambda rope: str(rope["rope_type"]))
def test_scaled_rotations(rope: dict[str, Any]) -> None:
    check(bfloat16_model("llama", rope_parameters=rope))


def quantized(module: Any, kind: str) -> Any:
    for path, child in list(module.named_modules()):
        if not isinstance(child, nn.Linear) or path == "lm_head":
            continue
        if kind == "w8a8":
            packed = pack_int8(child.weight, Activation("token"))
        else:
            packed = round_outer(child.weight, 4 if kind == "rtn" else 8, 64)
        replace_linear(module, path, QuantLinear(packed, child.bias))
    return module


def test_rounded_weights() -> None:
    module = quantized(bfloat16_model("qwen2", seed=5), "rtn")
    assert all(linear.choice.kernel == "QuantLab native" for linear in linears_of(module))
    check(module)


def test_ggml_blocks_everywhere() -> None:
    """A type for each linear in turn, and for the tied embedding and head."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    module = bfloat16_model("llama", seed=8, tie_word_embeddings=True, **shape)
    types = itertools.cycle(["q8_0", "q5_0", "q5_1", "q4_0", "q4_1", "iq4_nl"])

    def packed(weight: Tensor) -> GGMLWeight:
        name = next(types)
        return GGMLWeight(quantize_rows(weight.float(), name), name, weight.shape[1])

    for path, child in list(module.named_modules()):
        if isinstance(child, nn.Linear) and path != "lm_head":
            replace_linear(module, path, QuantLinear(packed(child.weight), child.bias))
    head = packed(module.lm_head.weight)
    replace_linear(module, "model.embed_tokens", QuantEmbedding(head))
    replace_linear(module, "lm_head", QuantLinear(head, None))
    assert refusal(module) is None
    check(module)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_rounded_tied_head(bits: int) -> None:
    module = quantized(bfloat16_model("llama", seed=6, tie_word_embeddings=True), "rtn")
    packed = round_outer(module.lm_head.weight, bits, 64)
    replace_linear(module, "model.embed_tokens", QuantEmbedding(packed))
    replace_linear(module, "lm_head", QuantLinear(packed, None))
    check(module)


def test_8_bit_inputs() -> None:
    """A code next to a tie may round the other way and then moves its row by a step: no bound of
    first order (the kernels' own tests have one). But that is rare. Inputs that were not rounded at
    all would be as far off as rounding changes the logits, other steps sqrt(2) times as far."""
    module = quantized(bfloat16_model("llama", seed=7), "w8a8")
    ids = tiny.token_ids(1, LENGTH, 1)[0]
    wide = in_float64(module)
    want = tiny.logits(wide, ids[None])[0]
    for child in wide.modules():
        if isinstance(child, RoundedInput):
            child.__class__ = nn.Linear
    effect = (tiny.logits(wide, ids[None])[0] - want).square().mean().sqrt()
    for parts in PARTS[:2]:
        found = read_in_parts(NativeDecoder(module, LENGTH), ids, parts, every=True)
        assert (found - want).square().mean().sqrt() < effect / 2


def test_int8_blocks_are_near_and_not_exact() -> None:
    """llama.cpp's way of 4 bits: 2^-8 of the largest x of a block of 32, per term."""
    module = quantized(bfloat16_model("llama", seed=8), "rtn")
    ids = tiny.token_ids(1, LENGTH, 1)[0]
    exact, _ = exact_and_bound(module, ids)
    decoder = NativeDecoder(module, LENGTH, exact=False)
    found = read_in_parts(decoder, ids, [1] * LENGTH, every=True).double()
    error = (found - exact).square().mean().sqrt() / exact.std()
    assert 1e-4 < float(error) < 0.05


def test_a_window_after_bos_is_read_from_position_one() -> None:
    module = bfloat16_model("mistral")
    window = tiny.token_ids(1, CHUNK + 22, 2)[0]
    for bos in (None, tiny.BOS):
        ids = window if bos is None else torch.cat([torch.tensor([bos]), window])
        decoder = NativeDecoder(module, len(ids))
        want = decoder.read(ids.tolist(), 0, every=True)[1][-len(window) :]
        starts, parts = zip(*decoder.chunks(window, bos), strict=True)
        assert starts == (0, CHUNK)
        bound = 1e-5 * want.abs().max()
        assert float((torch.cat(parts) - want).abs().max()) < bound


def test_a_full_cache_and_wrong_tokens() -> None:
    decoder = NativeDecoder(bfloat16_model(), 17)
    assert decoder.capacity == 32
    decoder.read([5] * 32, 0)
    with pytest.raises(ConfigError, match="33 tokens do not fit a cache of 32"):
        decoder.read([5], 32)
    with pytest.raises(ConfigError, match="no tokens"):
        decoder.read([], 0)
    for token in (-1, tiny.VOCABULARY):
        with pytest.raises(ConfigError, match=f"token {token}: .*0 to {tiny.VOCABULARY - 1}"):
            decoder.read([3, token], 0)


def test_a_session_goes_on_where_transformers_does() -> None:
    module = bfloat16_model("qwen3", seed=9)
    ours, theirs = NativeSession(NativeDecoder(module, 64)), Session(in_float64(module))
    prompt = tiny.token_ids(1, 20, 3)[0].tolist()
    with pytest.raises(RuntimeError, match="before prefill"):
        ours.step(3)
    for start in (0, 5):  # starting over forgets
        a, b = ours.prefill(prompt[start:]), theirs.prefill(prompt[start:])
        for _ in range(20):
            assert a == b
            a, b = ours.step(a), theirs.step(b)
    with pytest.raises(ConfigError, match="no tokens"):
        ours.prefill([])
    with pytest.raises(ConfigError, match="at most 64"):
        ours.prefill([3] * 65)
    last = NativeSession(NativeDecoder(module, 64), choose=lambda logits: int(logits.argmin()))
    assert last.prefill(prompt) == int(last.logits.argmin())


def test_refusals_give_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(bfloat16_model()) is None
    assert refusal(tiny.raw_model("gpt2")) == "the native decoder has no gpt2 blocks"
    relu = bfloat16_model("llama", hidden_act="relu")
    assert refusal(relu) == "the native decoder has no activation relu"
    wide = bfloat16_model().float()
    assert refusal(wide) == "the native decoder takes no torch.float32 weights"
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    dynamic = bfloat16_model("llama", rope_parameters=rope)
    assert refusal(dynamic) == "the native decoder has no dynamic rotation"
    with pytest.raises(ConfigError, match="no dynamic rotation"):
        NativeDecoder(dynamic, 16)
    monkeypatch.setenv("QUANTLAB_NATIVE", "off")
    assert "QUANTLAB_NATIVE=off" in str(refusal(bfloat16_model()))


@pytest.mark.slow
def test_greedy_text_of_the_bundled_model() -> None:
    """64 tokens, the same as the same weights in float32."""
    model: Any = load("bundled", dtype=torch.bfloat16)
    ids = model.tokenizer("The history of bread begins")["input_ids"]
    ours = NativeSession(NativeDecoder(model.module, 128))
    theirs = Session(copy.deepcopy(model.module).float())
    a, b = [ours.prefill(ids)], [theirs.prefill(ids)]
    for _ in range(63):
        a.append(ours.step(a[-1]))
        b.append(theirs.step(b[-1]))
    assert a == b
