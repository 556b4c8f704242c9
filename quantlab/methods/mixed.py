"""Mixed precision: bits by layer kind and name pattern, or allocated by measured sensitivity.

By hand, each linear takes its bits from the preset, then from its kind's option, then from the last
pattern that matches its name. With a budget, widths are chosen such that the sum of the linears'
KL divergences (each measured alone, `quantlab.sensitivity`) is least, by an exact knapsack
(`quantlab.allocation`). The budget is the mean bits a weight over all linears of the blocks, codes,
scales and zero-points counted; embedding, head and norms stand outside it.
Measuring needs the whole model in memory; without a budget one block at a time is.
The arithmetic is another method's, asked of the register for the linears of each width together.
Source: Dong et al. 2019, arXiv 1911.03852 (allocation by sensitivity); Frantar and Alistarh 2022,
arXiv 2208.11580, section 5 (losses of single layers, knapsack under a budget).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from quantlab import sensitivity
from quantlab.allocation import allocate
from quantlab.calibration import ActStats, StatKind
from quantlab.errors import ConfigError, MethodError
from quantlab.keys import content_key
from quantlab.methods import base
from quantlab.methods.by_width import quantize_by_width
from quantlab.models import Block, LoadedModel, block_list, get_block
from quantlab.packing import PackedWeight, Storage, affine_nbytes
from quantlab.sensitivity import Sensitivity

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


@dataclass(frozen=True)
class Plan:
    """Bits of every linear by name (`12.mlp.down_proj`), and with a budget what they rest on."""

    config: MixedConfig
    bits: dict[str, int]
    predicted_bits: float
    predicted_kl: float | None = None
    table: tuple[Sensitivity, ...] = ()
    probe: sensitivity.Probe | None = None


@base.register
class Mixed(base.Quantizer):
    name = "mixed"
    title = "Mixed precision"
    paper = "arXiv 1911.03852"
    summary = "Bits by layer kind or name, or allocated under a size budget by sensitivity."
    needs = ("second_moment", "mean")
    Config = MixedConfig

    def needs_for(self, config: MixedConfig | Plan) -> tuple[StatKind, ...]:
        """Of the arithmetic; a budget needs calibration text whether the arithmetic does or not."""
        chosen = config.config if isinstance(config, Plan) else config
        needs = base.registry()[chosen.arithmetic].needs
        return needs or (("square",) if chosen.budget else ())

    def whole_model(self, config: MixedConfig) -> bool:
        """A budget is allocated by the whole model's sensitivity."""
        return bool(config.budget)

    def weight_bits(self, config: MixedConfig) -> int:
        """The whole bits of a budget, else the fewest that any kind or pattern has."""
        if config.budget:
            return int(config.budget)
        rules = [bits for _, bits in parse_pattern(config.pattern)]
        return min([*config.kind_bits().values(), *rules])

    def storage(self, config: MixedConfig) -> Storage:
        if config.budget:
            bits = set(candidates(config))
        else:
            bits = set(config.kind_bits().values())
            for wanted, given in parse_pattern(config.pattern):
                bits = {given} if wanted == "*" else bits | {given}
            bits -= {16}
        widths, outer = tuple(sorted(bits)), config.outer_bits()
        return Storage("affine", widths, config.group_size, config.symmetric, outer=outer)

    def plan(
        self, model: LoadedModel, ids: Tensor | None, config: MixedConfig, step: base.Step
    ) -> Plan:
        shapes: dict[str, tuple[int, int]] = {}
        found: dict[str, int] = {}
        for index in range(len(block_list(model.module, model.family))):
            block = get_block(model.module, model.family, index)
            found |= {f"{index}.{p}": bits for p, bits in bits_by_hand(block, config).items()}
            for path, linear in block.linears.items():
                shapes[f"{index}.{path}"] = (linear.weight.shape[0], linear.weight.shape[1])
        for wanted, _ in parse_pattern(config.pattern):
            if not any(fnmatchcase(name, wanted) for name in shapes):
                raise ConfigError(
                    f"pattern={wanted}: no linear of this model has such a name; they are called "
                    f"like {next(iter(shapes))}"
                )
        if not config.budget:
            return Plan(config, found, mean_bits(shapes, found, config))
        if ids is None:
            raise MethodError("mixed: a budget needs calibration text")
        check_budget(shapes, config)
        table = self._sensitivities(model, ids, config, step)
        chosen = choose(table, config)
        predicted = sum(one.at(chosen[one.name]) for one in table)
        probe = sensitivity.Probe(
            model, sensitivity.pieces(ids, config.sensitivity_tokens, sensitivity.PIECE)
        )
        return Plan(
            config, chosen, mean_bits(shapes, chosen, config), predicted, tuple(table), probe
        )

    def _sensitivities(
        self, model: LoadedModel, ids: Tensor, config: MixedConfig, step: base.Step
    ) -> list[Sensitivity]:
        """Measured once for a model, its calibration tokens and the arithmetic; kept on disk."""
        settings = (
            config.arithmetic,
            config.group_size,
            config.symmetric,
            config.sensitivity_tokens,
        )
        key = content_key(
            {
                "model": model.source.fingerprint,
                "tokens": [list(ids.shape), ids.flatten().tolist()],
                "sensitivity": list(settings),
            }
        )
        known = sensitivity.read(key)
        if known is not None:
            return known
        method = base.registry()[config.arithmetic]

        def one(block: Block, stats: Mapping[str, ActStats], bits: int) -> PackedWeight:
            packed = method.quantize_block(block, stats, arithmetic_config(config, bits))
            return next(iter(packed.values()))

        measured = sensitivity.measure(
            model, ids, config.sensitivity_tokens, (2, *WIDTHS), method.needs, one, step
        )
        sensitivity.keep(key, measured)
        return measured

    def quantize_block(
        self, block: Block, stats: Mapping[str, ActStats], config: MixedConfig | Plan
    ) -> dict[str, PackedWeight]:
        if isinstance(config, Plan):
            bits = {path: config.bits[f"{block.index}.{path}"] for path in block.linears}
            config = config.config
            return self._by_width(block, stats, bits, config)
        if config.budget:
            raise MethodError("mixed: a budget needs the plan of the whole model")
        return self._by_width(block, stats, bits_by_hand(block, config), config)

    def _by_width(
        self,
        block: Block,
        stats: Mapping[str, ActStats],
        bits: Mapping[str, int],
        config: MixedConfig,
    ) -> dict[str, PackedWeight]:
        method = base.registry()[config.arithmetic]
        configs = {width: arithmetic_config(config, width) for width in set(bits.values()) - {16}}
        folds = config.arithmetic in FOLDING
        return quantize_by_width(block, stats, bits, method, configs, folds)

    def report(
        self, model: LoadedModel, plan: Plan, packed: Mapping[str, PackedWeight]
    ) -> dict[str, Any]:
        """`allocation`: bits of every linear, predicted and measured bits a weight; with a budget
        also the KL divergence predicted (the sum) and measured on the same calibration tokens, and
        the table of sensitivities."""
        prefix = f"{model.family.blocks}."
        weights = [w for path, w in packed.items() if path.startswith(prefix)]
        left = [shape for path, shape in left_alone(model, packed).items()]
        count = sum(w.shape[0] * w.shape[1] for w in weights) + sum(r * c for r, c in left)
        size = sum(w.nbytes for w in weights) + sum(2 * r * c for r, c in left)
        allocation: dict[str, Any] = {
            "budget": plan.config.budget or None,
            "predicted_bits_per_weight": plan.predicted_bits,
            "measured_bits_per_weight": 8 * size / count,
            "bits": plan.bits,
        }
        if plan.probe is not None:
            allocation |= {
                "predicted_kl_divergence": plan.predicted_kl,
                "measured_kl_divergence": plan.probe.divergence(0),
                "tokens": plan.probe.ids.numel(),
                "measured_at_bits": sensitivity.MEASURED_BITS,
                "sensitivities": [one.to_json() for one in plan.table],
            }
        return {"allocation": allocation}


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


def choose(table: Sequence[Sensitivity], config: MixedConfig) -> dict[str, int]:
    """The widths with the least predicted KL divergence under the budget."""
    widths = candidates(config)
    weights = sum(one.rows * one.columns for one in table)
    picked = allocate(
        [[linear_bytes(one.rows, one.columns, b, config) for b in widths] for one in table],
        [[one.at(b) for b in widths] for one in table],
        int(config.budget * weights / 8),
    )
    return {one.name: widths[option] for one, option in zip(table, picked, strict=True)}


def left_alone(
    model: LoadedModel, packed: Mapping[str, PackedWeight]
) -> dict[str, tuple[int, int]]:
    """Shapes of the blocks' linears that were not packed, by full path."""
    found = {}
    for index in range(len(block_list(model.module, model.family))):
        block = get_block(model.module, model.family, index)
        for path, linear in block.linears.items():
            full = f"{model.family.blocks}.{index}.{path}"
            if full not in packed:
                rows, columns = linear.weight.shape
                found[full] = (rows, columns)
    return found
