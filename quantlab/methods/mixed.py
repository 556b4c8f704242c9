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
from quantlab.methods.mixed_config import (
    FOLDING,
    WIDTHS,
    MixedConfig,
    arithmetic_config,
    bits_by_hand,
    candidates,
    check_budget,
    linear_bytes,
    mean_bits,
    parse_pattern,
)
from quantlab.models import Block, LoadedModel, block_list, get_block
from quantlab.packing import PackedWeight, Storage
from quantlab.sensitivity import Sensitivity


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
