"""The architecture table: where each family keeps its blocks, linears, norms and folds.

Paths are relative to one decoder block. A *fold* says which earlier operation can absorb a scale of
a linear's input channels: dividing the rows (or the norm's weight) of `source` by s and multiplying
the columns of `targets` by s leaves the block's function unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FoldKind = Literal["norm", "linear", "value"]


@dataclass(frozen=True, slots=True)
class Fold:
    """`kind`: 'norm' (source is a norm), 'linear' (the source's output reaches the targets channel
    by channel, possibly through a product or ReLU), 'value' (through attention: value channels,
    shared by the query heads of a key-value group)."""

    kind: FoldKind
    source: str
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the table.

    `linears` maps each linear's path in the block to its kind in ggml's vocabulary (attn_q,
    ffn_down, …), which size tables and GGUF files use. `norm_offset` is 1 where a norm multiplies
    by (1 + weight). `gguf` is llama.cpp's name of the architecture, None where it has none.
    """

    name: str
    blocks: str
    linears: tuple[tuple[str, str], ...]
    folds: tuple[Fold, ...]
    norm_offset: float = 0.0
    gguf: str | None = None
    first_class: bool = True


_LLAMA_LINEARS = (
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
)
_LLAMA_FOLDS = (
    Fold("norm", "input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Fold("value", "self_attn.v_proj", ("self_attn.o_proj",)),
    Fold("norm", "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    Fold("linear", "mlp.up_proj", ("mlp.down_proj",)),
)


def _llama_like(name: str, gguf: str) -> Family:
    return Family(name, "model.layers", _LLAMA_LINEARS, _LLAMA_FOLDS, gguf=gguf)


FAMILIES: dict[str, Family] = {
    "llama": _llama_like("Llama / SmolLM / TinyLlama", "llama"),
    "mistral": _llama_like("Mistral", "llama"),
    "qwen2": _llama_like("Qwen2 / Qwen2.5", "qwen2"),
    "gpt2": Family(
        "GPT-2",
        "transformer.h",
        (
            ("attn.c_attn", "attn_qkv"),
            ("attn.c_proj", "attn_output"),
            ("mlp.c_fc", "ffn_up"),
            ("mlp.c_proj", "ffn_down"),
        ),
        # GELU between c_fc and c_proj is not homogeneous, so c_proj has no fold.
        (
            Fold("norm", "ln_1", ("attn.c_attn",)),
            Fold("value", "attn.c_attn", ("attn.c_proj",)),
            Fold("norm", "ln_2", ("mlp.c_fc",)),
        ),
        gguf="gpt2",
    ),
    "opt": Family(
        "OPT",
        "model.decoder.layers",
        (
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.out_proj", "attn_output"),
            ("fc1", "ffn_up"),
            ("fc2", "ffn_down"),
        ),
        # ReLU(s * x) = s * ReLU(x) for s > 0, so fc1 can absorb fc2's input scale.
        (
            Fold(
                "norm",
                "self_attn_layer_norm",
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ),
            Fold("value", "self_attn.v_proj", ("self_attn.out_proj",)),
            Fold("norm", "final_layer_norm", ("fc1",)),
            Fold("linear", "fc1", ("fc2",)),
        ),
    ),
}


def generic_family(model_type: str, blocks: str) -> Family:
    """A family that is not in the table: every linear of a block, no folds."""
    return Family(model_type, blocks, (), (), first_class=False)
