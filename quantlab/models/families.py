"""The architecture table: where each family keeps its blocks, linears, norms and folds.

Paths are relative to one decoder block. A *fold* says which earlier operation can absorb a scale of
a linear's input channels: dividing the rows (or the norm's weight) of `source` by s and multiplying
the columns of `targets` by s leaves the block's function unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FoldKind = Literal["norm", "linear", "value"]
FoldRows = Literal["last", "last_of_head"]


@dataclass(frozen=True, slots=True)
class Fold:
    """`kind`: 'norm' (source is a norm), 'linear' (the source's output reaches the targets channel
    by channel, possibly through a product or ReLU), 'value' (through attention: value channels,
    shared by the query heads of a key-value group).

    `rows` says which rows of a fused source feed the targets: 'last' its last ones (values of a
    q-k-v projection, "up" of a gate-up one, and of course all of a source that is not fused),
    'last_of_head' the last third of every head's rows, where q, k and v of a head lie together."""

    kind: FoldKind
    source: str
    targets: tuple[str, ...]
    rows: FoldRows = "last"


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

    @property
    def note(self) -> str | None:
        """What a record says of a family that is not in the table."""
        if self.first_class:
            return None
        return f"{self.name} is not in the architecture table: generic path, no folds"


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


# Gemma 2 and 3 normalise before and after each sublayer; only the norm before it feeds linears.
_SANDWICH_FOLDS = tuple(
    Fold(fold.kind, fold.source.replace("post_attention", "pre_feedforward"), fold.targets)
    for fold in _LLAMA_FOLDS
)


def _llama_like(name: str, gguf: str) -> Family:
    """Norms of q and k, which some have, stand between projection and attention: no fold of a
    norm or of the values passes them."""
    return Family(name, "model.layers", _LLAMA_LINEARS, _LLAMA_FOLDS, gguf=gguf)


def _gemma(name: str, gguf: str, folds: tuple[Fold, ...]) -> Family:
    """GELU is on the gate; down reads a product that is linear in up."""
    return Family(name, "model.layers", _LLAMA_LINEARS, folds, norm_offset=1.0, gguf=gguf)


FAMILIES: dict[str, Family] = {
    "llama": _llama_like("Llama / SmolLM / TinyLlama", "llama"),
    "mistral": _llama_like("Mistral", "llama"),
    "qwen2": _llama_like("Qwen2 / Qwen2.5", "qwen2"),
    "qwen3": _llama_like("Qwen3", "qwen3"),
    "smollm3": _llama_like("SmolLM3", "smollm3"),
    "gemma": _gemma("Gemma", "gemma", _LLAMA_FOLDS),
    "gemma2": _gemma("Gemma 2", "gemma2", _SANDWICH_FOLDS),
    "gemma3_text": _gemma("Gemma 3", "gemma3", _SANDWICH_FOLDS),
    "phi3": Family(
        "Phi-3",
        "model.layers",
        (
            ("self_attn.qkv_proj", "attn_qkv"),
            ("self_attn.o_proj", "attn_output"),
            ("mlp.gate_up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
        ),
        (
            Fold("norm", "input_layernorm", ("self_attn.qkv_proj",)),
            Fold("value", "self_attn.qkv_proj", ("self_attn.o_proj",)),
            Fold("norm", "post_attention_layernorm", ("mlp.gate_up_proj",)),
            Fold("linear", "mlp.gate_up_proj", ("mlp.down_proj",)),
        ),
        gguf="phi3",
    ),
    "gpt_neox": Family(
        "GPT-NeoX / Pythia",
        "gpt_neox.layers",
        (
            ("attention.query_key_value", "attn_qkv"),
            ("attention.dense", "attn_output"),
            ("mlp.dense_h_to_4h", "ffn_up"),
            ("mlp.dense_4h_to_h", "ffn_down"),
        ),
        # Each sublayer has a norm of its own, whether they run in parallel or in turn. GELU between
        # the feed-forward's linears is not homogeneous.
        (
            Fold("norm", "input_layernorm", ("attention.query_key_value",)),
            Fold("value", "attention.query_key_value", ("attention.dense",), rows="last_of_head"),
            Fold("norm", "post_attention_layernorm", ("mlp.dense_h_to_4h",)),
        ),
        gguf="gptneox",
    ),
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
