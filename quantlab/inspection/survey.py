"""Statistics of every linear of a model: what they are, and the file that holds them.

Channel maxima are kept as their logarithms in 8 bits, between the least and the largest of each
input: a value comes back within a factor of (largest / least)^(1/510), 1.5 percent for a
massive activation 1,800 times the median channel. All other figures are float32.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantlab.errors import ModelError
from quantlab.learn.material import Origin

BUNDLED = Path(__file__).resolve().parents[2] / "assets" / "inspect" / "bundled.safetensors"
"""The survey of the bundled model, made by `scripts/inspect_assets.py`."""

WIDTHS = (2, 3, 4, 5, 6, 8)
"""Bits at which errors are known."""
GROUP_SIZE = 64
BINS = 48
WORST = 6
"""Input channels kept of every linear, those that add most to its output error at `WORST_BITS`."""
WORST_BITS = 4
FoldKind = Literal["norm", "linear", "value"]
SPAN = 1e-7
"""Maxima below this share of the largest are raised to it; that of a channel always 0 is one."""


@dataclass(frozen=True, eq=False)
class Input:
    """What one or several linears of a block read, over all calibration tokens.

    peaks: float32 [columns], largest |x| of each channel; low, high: smallest and largest x.
    weights: float32 [columns], largest |w| of each column over all linears that read it.
    fold: the kind of fold that takes SmoothQuant's scales of this input, None where the
    architecture has none.
    """

    peaks: Tensor
    weights: Tensor
    low: float
    high: float
    fold: FoldKind | None

    @property
    def typical(self) -> float:
        """The median channel's maximum."""
        return float(self.peaks.median())


@dataclass(frozen=True, eq=False)
class Linear:
    """One linear. `name` is `12.mlp.down_proj`, `shape` (rows, columns).

    histogram: int64 [BINS], weights by size, from -`largest` to `largest`.
    widest, usual: (least, largest) weight of the group of `GROUP_SIZE` that spans most, and of the
    one in the middle by span.
    weight_errors: ||D||^2 / ||W||^2, and output_errors: tr(D M D^T) / tr(W M W^T), by bits, D being
    the change that rounding to nearest makes (zero-point, groups of GROUP_SIZE) and M the second
    moment of the input.
    worst: (channel, share of sum_j M_jj sum_i D_ij^2), at WORST_BITS.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    read: Input
    largest: float
    histogram: Tensor
    widest: tuple[float, float]
    usual: tuple[float, float]
    weight_errors: dict[int, float]
    output_errors: dict[int, float]
    worst: tuple[tuple[int, float], ...]

    @property
    def block(self) -> int:
        return int(self.name.partition(".")[0])

    @property
    def path(self) -> str:
        return self.name.partition(".")[2]


@dataclass(frozen=True, eq=False)
class Survey:
    """`attention` is (heads, key-value heads, head_dim), for folds through the values."""

    origin: Origin
    linears: dict[str, Linear]
    attention: tuple[int, int, int]

    @property
    def blocks(self) -> int:
        return 1 + max(one.block for one in self.linears.values())

    @property
    def paths(self) -> list[str]:
        """The linears of a block, in their order; every path that any block has."""
        return list(dict.fromkeys(one.path for one in self.linears.values()))


def encode(peaks: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """Positive values as 8-bit logarithms: uint8 [n], and the natural logarithms of both ends."""
    top = max(float(peaks.max()), 1e-30)
    logs = peaks.double().clamp_min(top * SPAN).log()
    low, high = round(float(logs.min()), 6), round(float(logs.max()), 6)
    codes = ((logs - low) * (255 / max(high - low, 1e-12))).round().clamp(0, 255)
    return codes.to(torch.uint8), (low, high)


def decode(codes: Tensor, ends: Sequence[float]) -> Tensor:
    """What `encode` kept: float32 [n]."""
    low, high = ends
    return (codes.double() * ((high - low) / 255) + low).exp().float()


def write(path: Path, found: Survey) -> None:
    """Write a survey, whole or not at all. Raises: OSError."""
    linears = list(found.linears.values())
    inputs = list({id(one.read): one.read for one in linears}.values())
    places = {id(one): place for place, one in enumerate(inputs)}
    kept: dict[str, list[Tensor]] = {"peaks": [], "weights": []}
    about_inputs = []
    for one in inputs:
        ends = {}
        for name in kept:
            codes, ends[name] = encode(getattr(one, name))
            kept[name].append(codes)
        about_inputs.append(
            {
                "columns": len(one.peaks),
                "fold": one.fold,
                "range": [round(one.low, 6), round(one.high, 6)],
            }
            | ends
        )
    shares = [[share for _, share in one.worst] for one in linears]
    tensors = {
        **{name: torch.cat(parts) for name, parts in kept.items()},
        "histogram": torch.stack([one.histogram for one in linears]).sqrt().half(),
        "errors": torch.tensor(
            [[[errors[b] for b in WIDTHS] for errors in _errors(one)] for one in linears]
        ),
        "grids": torch.tensor([[one.largest, *one.widest, *one.usual] for one in linears]),
        "worst": torch.tensor([[channel for channel, _ in one.worst] for one in linears]).int(),
        "shares": torch.tensor(shares).half(),
    }
    about = [[one.name, one.kind, one.shape[0], places[id(one.read)]] for one in linears]
    metadata = {
        "origin": json.dumps(asdict(found.origin)),
        "inputs": json.dumps(about_inputs, separators=(",", ":")),
        "linears": json.dumps(about, separators=(",", ":")),
        "attention": json.dumps(found.attention),
    }
    partial = path.with_name(f"{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, partial, metadata=metadata)
    partial.replace(path)


def _errors(one: Linear) -> tuple[dict[int, float], dict[int, float]]:
    return one.weight_errors, one.output_errors


def load(path: Path = BUNDLED) -> Survey:
    """A survey from its file. Raises: ModelError."""
    try:
        return _load(path, path.stat().st_mtime_ns)
    except FileNotFoundError:
        raise ModelError(f"inspection: {path.name} is gone; read the model again") from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ModelError(
            f"inspection: the figures in {path.name} cannot be read ({error}); read the model again"
        ) from None


@lru_cache(maxsize=4)
def _load(path: Path, changed: int) -> Survey:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    about: list[dict[str, Any]] = json.loads(metadata["inputs"])
    columns = [one["columns"] for one in about]
    parts = {name: tensors[name].split(columns) for name in ("peaks", "weights")}
    inputs = [
        Input(
            decode(parts["peaks"][place], one["peaks"]),
            decode(parts["weights"][place], one["weights"]),
            float(one["range"][0]),
            float(one["range"][1]),
            one["fold"],
        )
        for place, one in enumerate(about)
    ]
    linears = {}
    for row, (name, kind, rows, place) in enumerate(json.loads(metadata["linears"])):
        largest, *grids = tensors["grids"][row].tolist()
        weight, output = (
            dict(zip(WIDTHS, values, strict=True)) for values in tensors["errors"][row].tolist()
        )
        worst = zip(tensors["worst"][row].tolist(), tensors["shares"][row].tolist(), strict=True)
        linears[name] = Linear(
            name,
            kind,
            (rows, columns[place]),
            inputs[place],
            largest,
            tensors["histogram"][row].float().square().round().long(),
            (grids[0], grids[1]),
            (grids[2], grids[3]),
            weight,
            output,
            tuple(worst),
        )
    heads, kv_heads, head_dim = json.loads(metadata["attention"])
    origin = Origin(**json.loads(metadata["origin"]))
    return Survey(origin, linears, (heads, kv_heads, head_dim))
