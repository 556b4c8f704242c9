"""llama.cpp's architectures as data: names of tensors, orders of rows, and what each cannot do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that its metadata and its row orders need."""

    blocks: int
    width: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    vocabulary: int


def rope_order(heads: int, head_dim: int) -> Tensor:
    """Row order of q or k in the file: int64 [heads * head_dim].

    transformers rotates channel i of a head with i + head_dim / 2, llama.cpp 2i with 2i + 1.
    """
    rows = torch.arange(heads * head_dim)
    return rows.view(heads, 2, head_dim // 2).transpose(1, 2).reshape(-1)


def fused_order(heads: int, head_dim: int) -> Tensor:
    """Row order of a q-k-v projection: int64 [3 * heads * head_dim]. GPT-NeoX keeps q, k and v of a
    head together, llama.cpp wants all q, then all k, then all v."""
    rows = torch.arange(3 * heads * head_dim)
    return rows.view(heads, 3, head_dim).transpose(0, 1).reshape(-1)


Order = Callable[[Shape], Tensor]
Claim = tuple[Callable[[Any, Shape], bool], str, str]
"""(whether a configuration is right, what it has otherwise, what would be right)"""

_ROPE: Mapping[str, Order] = {
    "attn_q": lambda shape: rope_order(shape.heads, shape.head_dim),
    "attn_k": lambda shape: rope_order(shape.kv_heads, shape.head_dim),
}


@dataclass(frozen=True)
class Names:
    """Paths in transformers' module -> tensor names of GGUF, without '.weight' and '.bias'."""

    outer: dict[str, str]
    norms: dict[str, str]
    """Relative to a block."""
    activations: tuple[str, ...]
    orders: Mapping[str, Order]
    """Kinds of linears whose rows llama.cpp wants in another order."""
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    partial_rope: bool = False
    windows: bool = False
    """Whether llama.cpp looks at the sliding window; elsewhere it attends to everything."""
    biases: Literal["may", "must", "no"] = "may"
    """Of the linears: 'must' where llama.cpp does not load a file without them."""
    claims: tuple[Claim, ...] = ()


_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_SANDWICH = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_SILU = ("silu", "swish")
_GELU = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")

_TIED: Claim = (
    lambda config, shape: bool(config.tie_word_embeddings),
    "output matrix apart from the embedding",
    "tied ones",
)
_CAUSAL: Claim = (
    lambda config, shape: not getattr(config, "use_bidirectional_attention", None),
    "bidirectional attention",
    "causal attention",
)


def _scaled_by_head(largest: int) -> Claim:
    """`largest`: blocks of the size of the family whose scale llama.cpp takes from the width."""
    return (
        lambda config, shape: (
            config.query_pre_attn_scalar
            == (shape.width // shape.heads if shape.blocks == largest else shape.head_dim)
        ),
        "other query_pre_attn_scalar",
        "the width of a head",
    )


def _alternating(period: int) -> Claim:
    wanted = "full_attention", "sliding_attention"
    return (
        lambda config, shape: (
            list(config.layer_types)
            == [wanted[bool((index + 1) % period)] for index in range(shape.blocks)]
        ),
        "other order of sliding windows",
        f"every block but each {period}{'nd' if period == 2 else 'th'}",
    )


def _local_rope(config: Any, shape: Shape) -> bool:
    rope = config.rope_parameters["sliding_attention"]
    return rope.get("rope_type", "default") == "default" and float(rope["rope_theta"]) == 10_000.0


ARCHITECTURES: dict[str, Names] = {
    "llama": Names(
        _OUTER, _NORMS, _SILU, orders=_ROPE, ropes=("default", "linear", "llama3", "yarn")
    ),
    "qwen2": Names(
        _OUTER,
        _NORMS,
        _SILU,
        orders={},
        claims=(
            (
                lambda config, shape: shape.heads * shape.head_dim == shape.width,
                "heads of another width",
                "heads that share the model's width evenly",
            ),
        ),
    ),
    "qwen3": Names(_OUTER, {**_NORMS, **_HEAD_NORMS}, _SILU, orders={}, biases="no"),
    "smollm3": Names(
        _OUTER,
        _NORMS,
        _SILU,
        orders=_ROPE,
        biases="no",
        claims=(
            (
                lambda config, shape: (
                    list(config.no_rope_layers)
                    == [int((index + 1) % 4 != 0) for index in range(shape.blocks)]
                ),
                "other choice of blocks without rope",
                "each 4th",
            ),
        ),
    ),
    "gemma": Names(_OUTER, _NORMS, _GELU, orders={}, biases="no", claims=(_TIED, _CAUSAL)),
    "gemma2": Names(
        _OUTER,
        _SANDWICH,
        _GELU,
        orders={},
        windows=True,
        biases="no",
        claims=(
            _TIED,
            _CAUSAL,
            _scaled_by_head(46),
            _alternating(2),
            (
                lambda config, shape: bool(
                    config.attn_logit_softcapping and config.final_logit_softcapping
                ),
                "attention or logits without a soft cap",
                "both capped",
            ),
        ),
    ),
    "gemma3": Names(
        _OUTER,
        {**_SANDWICH, **_HEAD_NORMS},
        _GELU,
        orders={},
        ropes=("default", "linear"),
        windows=True,
        biases="no",
        claims=(
            _CAUSAL,
            _scaled_by_head(62),
            _alternating(6),
            (_local_rope, "rope of its own in sliding windows", "one with base 10000"),
            (
                lambda config, shape: (
                    not (config.attn_logit_softcapping or config.final_logit_softcapping)
                ),
                "soft caps",
                "plain logits",
            ),
        ),
    ),
    "phi3": Names(
        _OUTER,
        _NORMS,
        _SILU,
        orders={},
        ropes=("default", "linear"),
        partial_rope=True,
        biases="no",
    ),
    "gpt2": Names(
        outer={
            "transformer.wte": "token_embd",
            "transformer.wpe": "position_embd",
            "transformer.ln_f": "output_norm",
            "lm_head": "output",
        },
        norms={"ln_1": "attn_norm", "ln_2": "ffn_norm"},
        activations=_GELU,
        orders={},
        claims=(
            (
                lambda config, shape: bool(getattr(config, "scale_attn_weights", True)),
                "attention without scaling",
                "scale_attn_weights",
            ),
            (
                lambda config, shape: not getattr(config, "scale_attn_by_inverse_layer_idx", False),
                "attention scaled by layer",
                "scale_attn_by_inverse_layer_idx=false",
            ),
        ),
    ),
    "gptneox": Names(
        outer={
            "gpt_neox.embed_in": "token_embd",
            "gpt_neox.final_layer_norm": "output_norm",
            "lm_head": "output",
        },
        norms=_NORMS,
        # Pythia's exact GELU is computed as tanh's by llama.cpp, as in every GGUF file of Pythia:
        # at most 0.0005 off, which is less than the float16 table that it reads.
        activations=("gelu", *_GELU),
        orders={"attn_qkv": lambda shape: fused_order(shape.heads, shape.head_dim)},
        ropes=("default",),
        partial_rope=True,
        biases="must",
    ),
}
"""By llama.cpp's name of the architecture."""
