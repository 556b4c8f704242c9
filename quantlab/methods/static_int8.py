"""Static INT8: int8 weights, and for each linear's input one 8-bit grid fixed in calibration.

    w ~ w_code * w_step              w_step = max|w| / 127 a row
    x ~ (x_code - zero) * x_step     x_step = (high - low) / 255, zero = round(-low / x_step)

[low, high], extended to contain 0, comes from an observer of the calibration activations (see
`quantlab.observers`): 'minmax' keeps everything, 'percentile' cuts the tails off, 'mse' minimises
the squared error. At run time nothing is looked for: the cheapest W8A8, and the one that massive
activations hurt most. It is SmoothQuant without the smoothing, packed in the same way.
Sources: Jacob et al. 2018 (arXiv 1712.05877); Krishnamoorthi 2018 (arXiv 1806.08342, 3.1);
Wu et al. 2020 (arXiv 2004.09602, 3.2) for the observers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.calibration import ActStats
from quantlab.errors import MethodError
from quantlab.methods import base
from quantlab.methods.w8a8 import int8_storage, pack_int8, static_activation
from quantlab.models import Block
from quantlab.observers import mse_range, percentile_range
from quantlab.packing import PackedWeight, Storage


@dataclass(frozen=True)
class StaticInt8Config(base.WeightConfig):
    bits: int = base.option(8, "Bits", "Bits of weights and activations.", choices=(8,))
    observer: str = base.option(
        "minmax",
        "Observer",
        "How calibration finds an input's range: all of it, all but the tails, or by least squared "
        "error.",
        choices=("minmax", "percentile", "mse"),
    )
    percentile: float = base.option(
        99.99,
        "Percentile",
        "Share of the values in percent that the percentile observer keeps; half of the rest is "
        "cut off on either side.",
        minimum=99.0,
        maximum=100.0,
        step=0.001,
        paper="99.9 to 99.9999, of |x|",
    )


@base.register
class StaticInt8(base.Quantizer):
    name = "static_int8"
    title = "Static INT8"
    paper = "arXiv 1712.05877"
    summary = "8-bit weights and activations on grids fixed in calibration."
    bits = (8,)
    needs = ("range", "histogram")
    Config = StaticInt8Config

    def activation_bits(self, config: StaticInt8Config) -> int:
        return 8

    def storage(self, config: StaticInt8Config) -> Storage:
        return int8_storage(config, "tensor")

    def quantize_block(
        self, block: Block, stats: Mapping[str, ActStats], config: StaticInt8Config
    ) -> dict[str, PackedWeight]:
        ranges = {path: observe(path, stats[path], config) for path in block.linears}
        return {
            path: pack_int8(linear.weight, static_activation(*ranges[path]))
            for path, linear in block.linears.items()
        }


def observe(path: str, stats: ActStats, config: StaticInt8Config) -> tuple[Tensor, Tensor]:
    """(low, high) of the input of linear `path`, scalars. Raises: MethodError."""
    assert stats.low is not None
    assert stats.high is not None
    assert stats.histogram is not None
    low, high = stats.low.min(), stats.high.max()
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise MethodError(f"static_int8: calibration activations of {path} are not finite")
    if config.observer == "percentile":
        return percentile_range(stats.histogram, config.percentile)
    if config.observer == "mse":
        return mse_range(stats.histogram)
    return low, high
