"""What decides a model's memory: layers, widths, heads and vocabulary, known or guessed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from quantlab.errors import ConfigError
from quantlab.models.families import FAMILIES

LIMITS = {
    "layers": 1_000,
    "width": 131_072,
    "feed_forward": 1_048_576,
    "heads": 1_024,
    "kv_heads": 1_024,
    "head_dim": 1_024,
    "vocabulary": 10_000_000,
}
"""The most that is believed of each number; beyond lies a slip of the hand."""
LEAST_PARAMETERS, MOST_PARAMETERS = 3e7, 1e13
CLOSE = 0.1
"""A model this near in size (as a fraction) is taken as the guess, just as it is."""


def check_whole(name: str, value: object, most: int) -> None:
    """Raises: ConfigError unless `value` is a whole number from 1 to `most`."""
    if not isinstance(value, int) or not 1 <= value <= most:
        raise ConfigError(f"{name}={value}: needs a whole number from 1 to {most:,}")


@dataclass(frozen=True)
class Matrix:
    """A linear of one block: its kind in ggml's words (`attn_q`), rows and columns."""

    kind: str
    rows: int
    columns: int


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only model.

    `family` is a key of `quantlab.models.families.FAMILIES`, which lists its linears; `biases` says
    which of them (and whether norms) have one; `positions` counts learned position embeddings.
    `guessed`: only a parameter count was given. Raises: ConfigError for numbers that cannot be.
    """

    layers: int
    width: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    family: str = "llama"
    biases: Literal["none", "qkv", "all"] = "none"
    positions: int = 0
    guessed: bool = False

    def __post_init__(self) -> None:
        for name, most in LIMITS.items():
            check_whole(name, getattr(self, name), most)
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"heads={self.heads}: needs a multiple of kv_heads={self.kv_heads}, since every "
                "key-value head serves equally many query heads"
            )

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """The linears of one block."""
        inner, shared = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sizes = {
            "attn_q": (inner, self.width),
            "attn_k": (shared, self.width),
            "attn_v": (shared, self.width),
            "attn_qkv": (inner + 2 * shared, self.width),
            "attn_output": (self.width, inner),
            "ffn_gate": (self.feed_forward, self.width),
            "ffn_up": (self.feed_forward, self.width),
            "ffn_down": (self.width, self.feed_forward),
        }
        return tuple(Matrix(kind, *sizes[kind]) for _, kind in FAMILIES[self.family].linears)

    @property
    def vectors(self) -> int:
        """Values of all norms and biases."""
        biased = {"none": (), "qkv": ("attn_q", "attn_k", "attn_v")}.get(self.biases)
        rows = sum(m.rows for m in self.matrices if biased is None or m.kind in biased)
        norms = (2 * self.layers + 1) * self.width * (2 if self.biases == "all" else 1)
        return norms + self.layers * rows

    @property
    def parameters(self) -> int:
        """Number of weights, a tied head counted once."""
        linears = self.layers * sum(m.rows * m.columns for m in self.matrices)
        tables = self.vocabulary * self.width * (1 if self.tied else 2)
        return linears + tables + self.vectors + self.positions * self.width


def _gpt2(vocabulary: int, positions: int, family: str) -> ModelShape:
    return ModelShape(
        12, 768, 3072, 12, 12, 64, vocabulary, True, family, biases="all", positions=positions
    )


_SMOLLM2 = ModelShape(30, 576, 1536, 9, 3, 64, 49_152, True)

CATALOGUED: dict[str, ModelShape] = {
    "bundled": _SMOLLM2,
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2,
    "HuggingFaceTB/SmolLM2-360M-Instruct": ModelShape(32, 960, 2560, 15, 5, 64, 49_152, True),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": ModelShape(22, 2048, 5632, 32, 4, 64, 32_000, False),
    "Qwen/Qwen2.5-0.5B-Instruct": ModelShape(
        24, 896, 4864, 14, 2, 64, 151_936, True, "qwen2", "qkv"
    ),
    "openai-community/gpt2": _gpt2(50_257, 1024, "gpt2"),
    "facebook/opt-125m": _gpt2(50_272, 2050, "opt"),
}
"""The catalogue's models, as their config.json files have it; a test compares the sums with the
catalogue's parameter counts."""

WELL_KNOWN: dict[str, ModelShape] = {
    "Llama-2-7B": ModelShape(32, 4096, 11_008, 32, 32, 128, 32_000, False),
    "Mistral-7B": ModelShape(32, 4096, 14_336, 32, 8, 128, 32_000, False, "mistral"),
    "Llama-3-8B": ModelShape(32, 4096, 14_336, 32, 8, 128, 128_256, False),
    "Llama-2-13B": ModelShape(40, 5120, 13_824, 40, 40, 128, 32_000, False),
    "Llama-2-70B": ModelShape(80, 8192, 28_672, 64, 8, 128, 32_000, False),
}
"""Models that published figures are about; too large for the catalogue."""

SHAPES: dict[str, ModelShape] = CATALOGUED | WELL_KNOWN


def of_shape(layers: int, width: int, heads: int, kv_heads: int, vocabulary: int) -> ModelShape:
    """A Llama of these numbers. What they leave open: heads of width / heads, a gated feed-forward
    of 8/3 of the width in whole 256s (as in arXiv 2302.13971), a tied head below a width of 1,500.

    Raises: ConfigError.
    """
    for name, value in (("width", width), ("heads", heads)):
        check_whole(name, value, LIMITS[name])
    if width % heads:
        raise ConfigError(f"width={width}: needs a multiple of heads={heads}")
    inner = math.ceil(width * 8 / 3 / 256) * 256
    return ModelShape(
        layers, width, inner, heads, kv_heads, width // heads, vocabulary, width < 1500
    )


def guess(parameters: float) -> ModelShape:
    """A shape for a number of weights: that of the nearest known model, where it is within a tenth
    in size, else one of its proportions, in whole groups of heads and whole layers.

    Raises: ConfigError for a count that no language model has.
    """
    if not LEAST_PARAMETERS <= parameters <= MOST_PARAMETERS:  # NaN is refused as well
        raise ConfigError(
            f"parameters={parameters:g}: needs a count from 30 million to 10 trillion"
        )
    llamas = [shape for shape in SHAPES.values() if shape.family in ("llama", "mistral")]
    near = min(llamas, key=lambda shape: abs(math.log(shape.parameters / parameters)))
    if abs(near.parameters / parameters - 1) <= CLOSE:
        return replace(near, guessed=True)
    share = near.heads // near.kv_heads
    scaled = near.heads * (parameters / near.parameters) ** (1 / 3)
    most = min(2 * scaled + share, LIMITS["heads"], LIMITS["width"] / near.head_dim)
    found = [
        _fitted(near, heads, parameters) for heads in range(share, math.floor(most) + 1, share)
    ]
    return min(found, key=lambda shape: _unlikeness(shape, near, parameters))


def _fitted(near: ModelShape, heads: int, parameters: float) -> ModelShape:
    """`near` with so many heads, and the depth that comes nearest to `parameters`."""
    width = heads * near.head_dim
    inner = max(round(width * near.feed_forward / near.width / 64) * 64, 64)
    one = replace(
        near,
        layers=1,
        width=width,
        heads=heads,
        kv_heads=heads * near.kv_heads // near.heads,
        feed_forward=inner,
        guessed=True,
    )
    block = replace(one, layers=2).parameters - one.parameters
    layers = 1 + round((parameters - one.parameters) / block)
    return replace(one, layers=min(max(layers, 1), LIMITS["layers"]))


def _unlikeness(shape: ModelShape, near: ModelShape, parameters: float) -> float:
    """How far off in size, and (a tenth as grave) in width a layer."""
    size = abs(math.log(shape.parameters / parameters))
    proportion = (shape.width / shape.layers) / (near.width / near.layers)
    return size + 0.1 * abs(math.log(proportion))
