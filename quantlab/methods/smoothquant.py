"""SmoothQuant: move the difficulty of quantizing from activations to weights, then use 8 bits.

    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)        W x = (W s)(x / s)

The division is folded into what produces x: the preceding norm (q k v, gate up) and, where the
architecture allows it, v -> o and up -> down. Weights get an absmax grid a row, activations either
one fixed grid a tensor (static, from calibration) or one a token (dynamic).
Source: Xiao et al. 2022, arXiv 2211.10438, equation 4 and section 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.calibration import ActStats
from quantlab.errors import ConfigError, MethodError
from quantlab.grid import find_grid, from_codes, range_to_grid, to_codes
from quantlab.methods import base
from quantlab.methods.w8a8 import int8_storage, pack_int8, static_activation
from quantlab.models import Block, Fold, apply_fold, fold_scale
from quantlab.packing import Activation, PackedWeight, Storage

ALPHAS = tuple(round(0.3 + 0.05 * step, 2) for step in range(13))
"""Migration strengths that the search tries: 0.3 to 0.9."""


@dataclass(frozen=True)
class SmoothQuantConfig(base.WeightConfig):
    bits: int = base.option(8, "Bits", "Bits of weights and activations.", choices=(8,))
    activations: str = base.option(
        "static",
        "Activation scales",
        "static: one grid a tensor, fixed in calibration; dynamic: one a token, at run time.",
        choices=("static", "dynamic"),
    )
    alpha: float = base.option(
        0.5,
        "Migration strength",
        "0 leaves the difficulty in the activations, 1 moves all of it into the weights; -1 is no "
        "smoothing at all (naive W8A8).",
        minimum=-1.0,
        maximum=1.0,
        step=0.05,
        paper="0.5",
    )
    search: bool = base.option(
        True,
        "Search alpha",
        "Pick alpha for every fold by its output error on the calibration sample, instead of the "
        "one above.",
    )
    fold_linears: bool = base.option(
        True,
        "Fold through linears",
        "Also fold v into o and up into down; the norms alone cannot reach those inputs.",
        paper="false",
    )

    def validate(self) -> None:
        super().validate()
        if -1.0 < self.alpha < 0.0:
            raise ConfigError(f"alpha={self.alpha}: needs 0 to 1, or -1 for no smoothing")


@base.register
class SmoothQuant(base.Quantizer):
    name = "smoothquant"
    title = "SmoothQuant"
    paper = "arXiv 2211.10438"
    summary = "8-bit weights and activations, outliers smoothed into the weights beforehand."
    bits = (8,)
    needs = ("range", "sample")
    sees_error = False  # As in the paper: calibrated once, on the unquantized model.
    Config = SmoothQuantConfig

    def activation_bits(self, config: SmoothQuantConfig) -> int:
        return 8

    def storage(self, config: SmoothQuantConfig) -> Storage:
        return int8_storage(config, "tensor" if config.activations == "static" else "token")

    def quantize_block(
        self, block: Block, stats: Mapping[str, ActStats], config: SmoothQuantConfig
    ) -> dict[str, PackedWeight]:
        for path in block.linears:
            if not bool(torch.isfinite(stats[path].max_abs).all()):
                raise MethodError(f"smoothquant: calibration activations of {path} are not finite")
        scales = {path: torch.ones(m.weight.shape[1]) for path, m in block.linears.items()}
        for fold in block.folds if config.alpha >= 0 or config.search else ():
            if fold.kind != "norm" and not config.fold_linears:
                continue
            scale = choose_scale(block, fold, stats[fold.targets[0]], config)
            apply_fold(block, fold, scale)
            scales.update(dict.fromkeys(fold.targets, scale))
        return {
            path: quantize_linear(linear.weight.float(), stats[path], scales[path], config)
            for path, linear in block.linears.items()
        }


def quantize_linear(
    weight: Tensor, stats: ActStats, scale: Tensor, config: SmoothQuantConfig
) -> PackedWeight:
    """int8 absmax a row, with the activation's scheme. `weight` already carries `scale`."""
    if config.activations == "static":
        return pack_int8(weight, static_activation(*static_range(stats, scale)))
    return pack_int8(weight, Activation("token"))


def static_range(stats: ActStats, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The calibrated extremes of x / s over all channels, scalars."""
    assert stats.low is not None
    assert stats.high is not None
    return (stats.low / scale).min(), (stats.high / scale).max()


def choose_scale(block: Block, fold: Fold, stats: ActStats, config: SmoothQuantConfig) -> Tensor:
    """Equation 4 for one fold: float32 [columns]; alpha searched or given."""
    weight = torch.cat([block.linears[target].weight for target in fold.targets]).float()
    peaks = stats.max_abs.clamp_min(1e-5)
    weight_peaks = weight.abs().amax(0).clamp_min(1e-5)

    def scale_for(alpha: float) -> Tensor:
        scale = (peaks.pow(alpha) / weight_peaks.pow(1 - alpha)).clamp_min(1e-5)
        return fold_scale(block, fold, scale)

    if not config.search:
        return scale_for(config.alpha)
    candidates = [torch.ones_like(peaks), *(scale_for(alpha) for alpha in ALPHAS)]
    losses = [simulated_error(weight, scale, stats, config) for scale in candidates]
    return candidates[losses.index(min(losses))]


def simulated_error(
    weight: Tensor, scale: Tensor, stats: ActStats, config: SmoothQuantConfig
) -> float:
    """Mean over sampled tokens of ||Q(W s) Q(x / s) - W x||^2 / ||W x||^2.

    Relative to each token: a token with a massive activation has a massive output as well, and the
    next norm divides by it; absolute errors would let such tokens decide alone.
    """
    x = stats.sample
    assert x is not None
    wanted = x @ weight.t()
    scaled = weight * scale
    step, zero = find_grid(scaled, 8, scaled.shape[1], symmetric=True)
    rounded = from_codes(to_codes(scaled, step, zero, 8), step, zero)
    smooth = x / scale
    if config.activations == "static":
        x_step, x_zero = range_to_grid(*static_range(stats, scale), 8, False)
    else:
        x_step = (smooth.abs().amax(1, keepdim=True) / 127).clamp_min(1e-12)
        x_zero = torch.full_like(x_step, 128.0)
    got = from_codes(to_codes(smooth, x_step, x_zero, 8), x_step, x_zero) @ rounded.t()
    return float(((got - wanted).square().sum(1) / wanted.square().sum(1).clamp_min(1e-12)).mean())
