"""The options of mixed precision: presets, rules by kind and name, and what widths cost.

`quantlab.methods.mixed` says how they are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from quantlab.errors import ConfigError
from quantlab.methods import base
from quantlab.models import Block
from quantlab.packing import affine_nbytes

WIDTHS = (3, 4, 5, 6, 8)
"""Candidates of the allocation; 2 joins them below `LOW_BUDGET`, where it is needed."""
LOW_BUDGET = 4.0
FOLDING = ("awq",)
"""Arithmetics that fold scales through the block."""
FIXED = {"gptq": {"gptaq": "never"}}
"""Options of an arithmetic that are not its defaults, so that every width needs the same
statistics."""
CHOICES = (0, 16, 8, 7, 6, 5, 4, 3, 2)
"""Bits of a kind: 0 as the preset says, 16 left alone."""

PRESETS: dict[str, dict[str, int]] = {
    "article": {"attention": 8, "feed-forward": 4, "embedding": 16, "head": 16},
    "article-outer-8": {"attention": 8, "feed-forward": 4, "embedding": 8, "head": 8},
    "outer-8": {"attention": 4, "feed-forward": 4, "embedding": 8, "head": 8},
    "feed-forward-8": {"attention": 4, "feed-forward": 8, "embedding": 16, "head": 16},
    "all-4": {"attention": 4, "feed-forward": 4, "embedding": 16, "head": 16},
}
"""`article` is source article 001's recipe: attention 8, feed-forward 4, embeddings 16."""


@dataclass(frozen=True)
class MixedConfig(base.WeightConfig):
    embedding_bits: int = base.option(
        0,
        "Embedding bits",
        "Bits of the token embedding; 0 as the preset says, 16 leaves it alone. Where it serves as "
        "head too (tied), set the head's alike.",
        choices=CHOICES,
        paper="16",
    )
    head_bits: int = base.option(
        0,
        "Head bits",
        "Bits of the output head; 0 as the preset says, 16 leaves it alone.",
        choices=CHOICES,
        paper="16",
    )
    arithmetic: str = base.option(
        "gptq",
        "Arithmetic",
        "The method that rounds each linear at its bits.",
        choices=("gptq", "awq", "rtn"),
    )
    preset: str = base.option(
        "article",
        "Preset",
        "Bits by layer kind to start from; 'article' is attention 8, feed-forward 4, embedding 16.",
        choices=tuple(PRESETS),
    )
    attention_bits: int = base.option(
        0,
        "Attention bits",
        "Bits of the attention's linears; 0 as the preset says, 16 leaves them alone.",
        choices=CHOICES,
    )
    feed_forward_bits: int = base.option(
        0,
        "Feed-forward bits",
        "Bits of the feed-forward's linears; 0 as the preset says, 16 leaves them alone.",
        choices=CHOICES,
    )
    pattern: str = base.option(
        "",
        "Patterns",
        "Bits by name, such as *.down_proj=8;0.*=8: block number and path, * for anything; "
        "separated by semicolons, the last that matches counts.",
    )
    budget: float = base.option(
        0.0,
        "Budget",
        "Mean bits a weight over the linears of all blocks, scales and zero-points counted; bits "
        "are then allocated by measured sensitivity. 0: by preset and patterns.",
        minimum=0.0,
        maximum=16.0,
        step=0.1,
    )
    sensitivity_tokens: int = base.option(
        1024,
        "Sensitivity tokens",
        "Calibration tokens on which each linear's sensitivity is measured.",
        minimum=64,
        maximum=65536,
    )
    group_size: int = base.option(
        64, "Group size", "Weights that share one scale.", minimum=8, maximum=65536
    )
    symmetric: bool = base.option(
        False, "Symmetric", "Grid around zero; otherwise with a zero-point."
    )

    def validate(self) -> None:
        super().validate()
        rules = parse_pattern(self.pattern)
        if 0 < self.budget < 2:
            raise ConfigError(f"budget={self.budget}: needs more than 2 bits a weight, or 0")
        if self.budget and (rules or self.attention_bits or self.feed_forward_bits):
            raise ConfigError(
                f"budget={self.budget}: bits are allocated; leave pattern, attention_bits and "
                "feed_forward_bits out, or set budget=0"
            )

    def outer_bits(self) -> tuple[int, int]:
        preset = PRESETS[self.preset]
        return self.embedding_bits or preset["embedding"], self.head_bits or preset["head"]

    def kind_bits(self) -> dict[str, int]:
        """Bits of attention and feed-forward."""
        preset = PRESETS[self.preset]
        return {
            "attention": self.attention_bits or preset["attention"],
            "feed-forward": self.feed_forward_bits or preset["feed-forward"],
        }


def parse_pattern(text: str) -> list[tuple[str, int]]:
    """`*.down_proj=8;0.*=8` as (pattern, bits). Raises: ConfigError."""
    rules = []
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        name, equals, bits = (piece.strip() for piece in part.rpartition("="))
        if "," in part or ":" in part or not equals or not name or "=" in name:
            raise ConfigError(
                f"pattern={part}: needs NAME=BITS separated by semicolons, like *.down_proj=8;0.*=8"
            )
        if not bits.isdecimal() or int(bits) not in CHOICES[1:]:
            raise ConfigError(f"pattern={part}: needs 2 to 8 bits, or 16 to leave a linear alone")
        rules.append((name, int(bits)))
    return rules


def bits_by_hand(block: Block, config: MixedConfig) -> dict[str, int]:
    """Bits of each linear of the block by preset, kind and pattern. Raises: ConfigError."""
    kinds, rules = config.kind_bits(), parse_pattern(config.pattern)
    found = {}
    for path in block.linears:
        bits = kinds[layer_kind(block.kinds[path])]
        for wanted, given in rules:
            if fnmatchcase(f"{block.index}.{path}", wanted):
                bits = given
        found[path] = bits
    return found


def layer_kind(kind: str) -> str:
    """'attention' or 'feed-forward', of a kind in ggml's vocabulary or a generic family's path."""
    attention = kind.startswith("attn_") or "attn" in kind or "attention" in kind
    return "attention" if attention else "feed-forward"


def arithmetic_config(config: MixedConfig, bits: int) -> Any:
    """The base method's Config at `bits`; its other options are its defaults or
    `FIXED`."""
    make: Any = base.registry()[config.arithmetic].Config
    settings = {"bits": bits, "group_size": config.group_size, "symmetric": config.symmetric}
    made = make(**settings, **FIXED.get(config.arithmetic, {}))
    made.validate()
    return made


def linear_bytes(rows: int, columns: int, bits: int, config: MixedConfig) -> int:
    """Bytes of one linear at `bits`, as it will be packed."""
    if bits == 16:
        return 2 * rows * columns
    group = min(config.group_size, columns)
    return affine_nbytes(rows, columns, bits, group, config.symmetric)


def mean_bits(
    shapes: Mapping[str, tuple[int, int]], bits: Mapping[str, int], config: MixedConfig
) -> float:
    """Bits a weight over these linears, scales and zero-points counted."""
    size = sum(linear_bytes(r, c, bits[name], config) for name, (r, c) in shapes.items())
    return 8 * size / sum(rows * columns for rows, columns in shapes.values())


def candidates(config: MixedConfig) -> tuple[int, ...]:
    return (2, *WIDTHS) if config.budget < LOW_BUDGET else WIDTHS


def check_budget(shapes: Mapping[str, tuple[int, int]], config: MixedConfig) -> None:
    """Raise ConfigError when not even the fewest bits fit."""
    least = mean_bits(shapes, dict.fromkeys(shapes, min(candidates(config))), config)
    if least > config.budget:
        raise ConfigError(
            f"budget={config.budget}: the least possible with group_size={config.group_size} is "
            f"{least:.4g} bits a weight, scales counted; raise the budget or the group size"
        )
