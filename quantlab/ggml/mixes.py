"""File types such as q4_k_m: which block format each tensor of a model gets.

A "mix" gives tensors that hurt more when rounded a better format than the rest. The rules are those
of llama.cpp (`src/llama-quant.cpp`, as in llama-cpp-python 0.3.36) for dense models; its exceptions
for Falcon and for mixtures of experts are left out. One-dimensional tensors (norms, biases) and
position embeddings are never quantized and are not asked about here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from quantlab.errors import ConfigError

from . import FORMATS

TENSOR_KINDS = (
    "token_embd",
    "output",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_qkv",
    "attn_output",
    "ffn_gate",
    "ffn_up",
    "ffn_down",
)
"""The kinds of matrix a mix tells apart, named as in GGUF files."""


@dataclass(frozen=True)
class FileType:
    """A file type that a person can name."""

    name: str
    bits: int
    """Nominal bits a weight."""
    ftype: int
    """Number of the type in GGUF files (`general.file_type`, `LLAMA_FTYPE_*`)."""
    base: str
    """Block format of the tensors that no rule singles out."""
    description: str


FILE_TYPES: dict[str, FileType] = {
    entry.name: entry
    for entry in (
        FileType("f32", 32, 0, "f32", "32-bit floating point"),
        FileType("bf16", 16, 32, "bf16", "bfloat16"),
        FileType("f16", 16, 1, "f16", "16-bit floating point"),
        FileType("q8_0", 8, 7, "q8_0", "8 bits, blocks of 32 with a scale"),
        FileType("q6_k", 6, 18, "q6_k", "6 bits throughout, super-blocks of 256"),
        FileType("q5_k_m", 5, 17, "q5_k", "5 bits, half of attn_v and ffn_down in q6_k"),
        FileType("q5_k_s", 5, 16, "q5_k", "5 bits throughout, super-blocks of 256"),
        FileType("q5_1", 5, 9, "q5_1", "5 bits, blocks of 32 with a scale and a minimum"),
        FileType("q5_0", 5, 8, "q5_0", "5 bits, blocks of 32 with a scale"),
        FileType("q4_k_m", 4, 15, "q4_k", "4 bits, half of attn_v and ffn_down in q6_k"),
        FileType("q4_k_s", 4, 14, "q4_k", "4 bits, the first attn_v and ffn_down in q5_k"),
        FileType("q4_1", 4, 3, "q4_1", "4 bits, blocks of 32 with a scale and a minimum"),
        FileType("q4_0", 4, 2, "q4_0", "4 bits, blocks of 32 with a scale"),
        FileType("iq4_nl", 4, 25, "iq4_nl", "4 bits on unevenly spaced levels, blocks of 32"),
        FileType("q3_k_l", 3, 13, "q3_k", "3 bits; attn_v, attn_output and ffn_down in q5_k"),
        FileType("q3_k_m", 3, 12, "q3_k", "3 bits; attn_v, attn_output and ffn_down in q4_k"),
        FileType("q3_k_s", 3, 11, "q3_k", "3 bits throughout, super-blocks of 256"),
        FileType("q2_k", 2, 10, "q2_k", "2 bits; attn_v, attn_output and ffn_down in q3_k"),
        FileType("q2_k_s", 2, 21, "q2_k", "2 bits; llama.cpp makes it only with importance"),
    )
}
"""Every file type by name, from the most bits to the fewest."""

FALLBACKS = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
"""What a K format becomes when a row is not a whole number of its blocks."""


@dataclass(frozen=True)
class _Tensor:
    kind: str
    index: int
    count: int
    gqa: int
    importance: bool


def tensor_type(
    mix: str,
    tensor_kind: str,
    block_index: int,
    block_count: int,
    columns: int,
    rows: int,
    *,
    gqa: int,
    tied_head: bool,
    importance: bool = False,
) -> str:
    """The block format of one matrix in a file of type `mix`.

    Args:
        mix: a key of `FILE_TYPES`.
        tensor_kind: one of `TENSOR_KINDS`.
        block_index: transformer block of the matrix, from 0; ignored for token_embd and output.
        block_count: transformer blocks in the model.
        columns: values a row, the input width.
        rows: output width. llama.cpp's rules do not look at it.
        gqa: query heads per key-value head.
        tied_head: the model has no output matrix of its own, so token_embd serves as one.
        importance: an importance matrix is used (it changes q4_0, q5_0 and iq4_nl a little).

    Returns: a key of `quantlab.ggml.FORMATS`.

    Raises: ConfigError for an unknown mix or kind.
    """
    if mix not in FILE_TYPES:
        raise ConfigError(f"unknown GGUF type {mix!r}; known: {', '.join(FILE_TYPES)}")
    if tensor_kind not in TENSOR_KINDS:
        raise ConfigError(f"unknown tensor kind {tensor_kind!r}; known: {', '.join(TENSOR_KINDS)}")
    base = FILE_TYPES[mix].base
    if base in ("f32", "f16", "bf16"):
        return base
    if tensor_kind == "output" or (tensor_kind == "token_embd" and tied_head):
        wanted = _head_type(base, columns)
    else:
        tensor = _Tensor(tensor_kind, block_index, block_count, gqa, importance)
        rule = _RULES.get(mix)
        wanted = (rule(tensor) if rule else None) or base
        if tensor_kind in ("attn_v", "attn_qkv") and _is_70b(tensor) and wanted in ("q3_k", "q4_k"):
            wanted = "q5_k"
    return _fitting(wanted, columns)


def _head_type(base: str, columns: int) -> str:
    """The output matrix: q6_k, or q8_0 where the base type does not fit the width."""
    if base == "q8_0" or columns % FORMATS[base].block_size:
        return "q8_0"
    return "q6_k"


def _fitting(wanted: str, columns: int) -> str:
    """The wanted format, its 32-wide fallback, or f16."""
    if columns % FORMATS[wanted].block_size:
        wanted = FALLBACKS.get(wanted, "f16")
    return "f16" if columns % FORMATS[wanted].block_size else wanted


def _more_bits(tensor: _Tensor) -> bool:
    """The first and last eighth of the blocks and every third between: half of them, roughly."""
    first = tensor.count // 8
    last = 7 * tensor.count // 8
    return tensor.index < first or tensor.index >= last or (tensor.index - first) % 3 == 2


def _is_70b(tensor: _Tensor) -> bool:
    """80 blocks with shared key-value heads: attn_v is small, so llama.cpp spends more on it."""
    return tensor.count == 80 and tensor.gqa > 1


def _early(tensor: _Tensor, parts: int = 8) -> bool:
    return tensor.index < tensor.count // parts


# One rule a mix: the format it gives this tensor, or None for the base format. attn_qkv counts as
# attn_v, as in llama.cpp.


def _is_value(tensor: _Tensor) -> bool:
    return tensor.kind in ("attn_v", "attn_qkv")


def _q2_k(tensor: _Tensor) -> str | None:
    if _is_value(tensor):
        return "q4_k" if tensor.gqa >= 4 else "q3_k"
    return "q3_k" if tensor.kind in ("ffn_down", "attn_output") else None


def _q2_k_s(tensor: _Tensor) -> str | None:
    if _is_value(tensor) and tensor.gqa >= 4:
        return "q4_k"
    return "q4_k" if tensor.kind == "ffn_down" and _early(tensor) else None


def _q3_k_m(tensor: _Tensor) -> str | None:
    if _is_value(tensor):
        return "q5_k" if tensor.index < 2 else "q4_k"
    if tensor.kind == "ffn_down":
        return "q5_k" if _early(tensor, 16) else "q4_k"
    return "q4_k" if tensor.kind == "attn_output" else None


def _q3_k_l(tensor: _Tensor) -> str | None:
    return "q5_k" if _is_value(tensor) or tensor.kind in ("ffn_down", "attn_output") else None


def _q4_k_s(tensor: _Tensor) -> str | None:
    if _is_value(tensor):
        return "q5_k" if tensor.index < 4 else None
    return "q5_k" if tensor.kind == "ffn_down" and _early(tensor) else None


def _k_m(tensor: _Tensor) -> str | None:
    sensitive = _is_value(tensor) or tensor.kind == "ffn_down"
    return "q6_k" if sensitive and _more_bits(tensor) else None


def _q4_0(tensor: _Tensor) -> str | None:
    return "q4_1" if tensor.kind == "ffn_down" and tensor.importance and _early(tensor) else None


def _q5_0(tensor: _Tensor) -> str | None:
    return "q5_1" if tensor.kind == "ffn_down" and tensor.importance and _early(tensor) else None


def _iq4_nl(tensor: _Tensor) -> str | None:
    if _is_value(tensor):
        return "q5_k" if tensor.gqa >= 4 else None
    if tensor.kind == "ffn_down" and not tensor.importance and _early(tensor):
        return "q5_k"
    return None


_RULES: dict[str, Callable[[_Tensor], str | None]] = {
    "q2_k": _q2_k,
    "q2_k_s": _q2_k_s,
    "q3_k_m": _q3_k_m,
    "q3_k_l": _q3_k_l,
    "q4_k_s": _q4_k_s,
    "q4_k_m": _k_m,
    "q5_k_m": _k_m,
    "q4_0": _q4_0,
    "q5_0": _q5_0,
    "iq4_nl": _iq4_nl,
}
