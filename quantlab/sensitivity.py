"""How much each linear alone costs: the KL divergence to the original when only it is quantized.

Measuring every linear at every width by whole forward passes is dear. Here, for each linear,

    measured    KL(original || model with this linear at `MEASURED_BITS`), a mean over tokens
    scaled      KL(b) = KL(measured) * e(b) / e(measured),  e(b) = tr(D_b M D_b^T)

with D_b the change of the weight at b bits and M the second moment of its inputs: for small
changes KL is quadratic in the linear's output error, so its ratio between widths is that of e. A
measurement runs only the blocks from the linear's own on, from hidden states kept in front of each
block (bfloat16 products where the CPU has them), and the head in float32 on every second token.
bfloat16 rounding makes a divergence by itself (1e-4 to 4e-4 on the bundled model, less towards the
end): it is measured for each block with a change too small to matter, and taken off; and 3 bits
rather than 4 are measured, which on most linears stands ten times above it.
Source of the idea: Frantar and Alistarh 2022 (arXiv 2208.11580, section 5) allocate with measured
single-layer losses; Dong et al. 2019 (arXiv 1911.03852) with second-order ones.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantlab.calibration import ActStats, BlockRunner, StatKind
from quantlab.errors import MethodError
from quantlab.metrics.divergence import kl_divergence
from quantlab.metrics.quality import Head
from quantlab.models import Block, LoadedModel, block_list, get_block
from quantlab.packing import PackedWeight
from quantlab.paths import home
from quantlab.texts import calibration_autocast

MEASURED_BITS = 3
PIECE = 256
"""Longest piece of text of a measurement, in tokens: many short ones vary less than few long."""
STRIDE = 2
"""The head, a third of a measurement, is applied to every second position."""
STATISTICS_TOKENS = 4096
"""Calibration tokens that inputs' statistics are taken from, for the arithmetic of the base."""

QuantizeOne = Callable[[Block, Mapping[str, ActStats], int], PackedWeight]
"""The packed weight of a block's only linear at so many bits."""
Step = Callable[[int, int], None]


@dataclass(frozen=True)
class Sensitivity:
    """One linear: `name` (`12.mlp.down_proj`), `kind`, its shape, the measured KL divergence (nats
    a token, at MEASURED_BITS) and the relative output error e(b) / tr(W M W^T) of each width."""

    name: str
    kind: str
    rows: int
    columns: int
    measured: float
    errors: dict[int, float]

    def at(self, bits: int) -> float:
        """KL divergence in nats a token at `bits`: measured, or scaled by the output error."""
        known = self.errors[MEASURED_BITS]
        return self.measured * self.errors[bits] / known if known > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        errors = {str(bits): error for bits, error in self.errors.items()}
        return {**dataclasses.asdict(self), "errors": errors}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sensitivity:
        errors = {int(bits): float(error) for bits, error in data["errors"].items()}
        return cls(**{**data, "errors": errors})


class Probe:
    """KL(original || the model as it is now) on a few pieces of text, nats a token.

    ids: int64 [pieces, length]. Keeps the hidden states in front of every block and the original's
    logits: 4 * tokens * (blocks * width + vocabulary / STRIDE) bytes.
    """

    @torch.inference_mode()
    def __init__(self, model: LoadedModel, ids: Tensor) -> None:
        self.ids = ids
        self._base = model.module.base_model
        self._head = Head(model.module)
        self._blocks = list(block_list(model.module, model.family))
        self._inputs: list[Tensor] = []
        self._tuples: list[bool] = []
        handles: list[Any] = []
        for block in self._blocks:
            handles.append(block.register_forward_hook(self._record))
        try:
            hidden = self._hidden()
        finally:
            for handle in handles:
                handle.remove()
        self._logits = [self._head(part) for part in hidden.split(128)]

    def _record(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._inputs.append(args[0].float().clone())
        self._tuples.append(isinstance(output, tuple))

    def _hidden(self) -> Tensor:
        with calibration_autocast():
            states: Tensor = self._base(self.ids, use_cache=False).last_hidden_state
        return states[:, ::STRIDE].flatten(0, 1).float()

    @torch.inference_mode()
    def divergence(self, first: int) -> float:
        """`first`: no block before this one has changed; they are skipped."""
        with self._skipping(first):
            hidden = self._hidden()
        total = 0.0
        for part, original in zip(hidden.split(128), self._logits, strict=True):
            total += float(kl_divergence(original, self._head(part)).double().sum())
        return total / hidden.shape[0]

    @contextmanager
    def _skipping(self, first: int) -> Iterator[None]:
        """Blocks before `first` pass on the hidden states kept in front of it."""

        def passing(index: int) -> Callable[..., Any]:
            def forward(hidden: Tensor, *_: Any, **__: Any) -> Any:
                given = self._inputs[first] if index == 0 else hidden
                return (given,) if self._tuples[index] else given

            return forward

        skipped = self._blocks[:first]
        for index, block in enumerate(skipped):
            block.__dict__["forward"] = passing(index)
        try:
            yield
        finally:
            for block in skipped:
                del block.__dict__["forward"]


@torch.no_grad()
def measure(
    model: LoadedModel,
    ids: Tensor,
    tokens: int,
    widths: Sequence[int],
    needs: Sequence[StatKind],
    quantize: QuantizeOne,
    step: Step,
) -> list[Sensitivity]:
    """The sensitivity of every linear of the blocks; the model is left as it was.

    ids: int64 [pieces, length] calibration tokens, of which about `tokens` serve to measure.
    Raises: MethodError when a measurement is not finite.
    """
    probe = Probe(model, pieces(ids, tokens, PIECE))
    runner = BlockRunner(model, pieces(ids, STATISTICS_TOKENS, ids.shape[1]))
    count = len(block_list(model.module, model.family))
    found: list[Sensitivity] = []
    for index in range(count):
        block = get_block(model.module, model.family, index)
        stats = runner.collect(block, {*needs, "second_moment"})
        floor = rounding_floor(block, probe)
        for done, path in enumerate(block.linears):
            step(index * len(block.linears) + done, count * len(block.linears))
            one = alone(block, path)
            found.append(_measure_one(one, path, stats[path], widths, quantize, probe, floor))
        if index < count - 1:
            runner.advance(block)
    return found


def rounding_floor(block: Block, probe: Probe) -> float:
    """The divergence that bfloat16 rounding alone makes behind a change in this block: of weights
    moved by a ten-thousandth, whose own effect is a thousandth of 8-bit rounding's."""
    linear = next(iter(block.linears.values()))
    original = linear.weight.detach().clone()
    noise = torch.randn(original.shape, generator=torch.Generator().manual_seed(0))
    linear.weight.mul_(1 + 1e-4 * noise)
    try:
        return probe.divergence(block.index)
    finally:
        linear.weight.copy_(original)


def _measure_one(
    block: Block,
    path: str,
    stats: ActStats,
    widths: Sequence[int],
    quantize: QuantizeOne,
    probe: Probe,
    floor: float,
) -> Sensitivity:
    linear, moment = block.linears[path], stats.second_moment
    assert moment is not None
    original = linear.weight.detach().clone()
    whole = float(((original.float() @ moment) * original).sum())
    errors: dict[int, float] = {}
    measured = 0.0
    for bits in sorted({*widths, MEASURED_BITS}):
        dense = quantize(block, {path: stats}, bits).dequantize()
        change = dense - original.float()
        errors[bits] = float(((change @ moment) * change).sum()) / max(whole, 1e-30)
        if bits == MEASURED_BITS:
            linear.weight.copy_(dense)
            try:
                # A tenth of the floor is as fine as this can see.
                measured = max(probe.divergence(block.index) - floor, floor / 10)
            finally:
                linear.weight.copy_(original)
    if not torch.isfinite(torch.tensor([measured, *errors.values()])).all():
        raise MethodError(f"block {block.index}: the sensitivity of {path} is not finite")
    rows, columns = original.shape
    name = f"{block.index}.{path}"
    return Sensitivity(name, block.kinds[path], rows, columns, measured, errors)


def alone(block: Block, path: str) -> Block:
    """The block with one linear only, and no folds."""
    return dataclasses.replace(
        block, linears={path: block.linears[path]}, kinds={path: block.kinds[path]}, folds=()
    )


def pieces(ids: Tensor, tokens: int, longest: int) -> Tensor:
    """About `tokens` tokens of `ids`, evenly spread, in pieces of at most `longest`."""
    length = min(longest, ids.shape[1], max(tokens, 1))
    whole = ids[:, : ids.shape[1] // length * length].reshape(-1, length)
    count = min(max(tokens // length, 1), whole.shape[0])
    return whole[torch.arange(count) * whole.shape[0] // count]


def read(key: str) -> list[Sensitivity] | None:
    """What an earlier measurement with this content key kept, None where there is nothing whole."""
    try:
        rows = json.loads(_file(key).read_text(encoding="utf-8"))
        return [Sensitivity.from_json(row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def keep(key: str, found: Sequence[Sensitivity]) -> None:
    """Written beside and renamed, so that no half-written table is ever found. Raises: OSError."""
    path = _file(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps([one.to_json() for one in found]), encoding="utf-8")
    partial.replace(path)


def _file(key: str) -> Path:
    return home() / "sensitivities" / f"{key}.json"
