"""Activation statistics of a block's linears, gathered while token batches stream through it.

Only what a method asks for is kept. Every statistic is of the *input* x (float [tokens, columns])
of a linear; linears that read the same tensor (q, k, v; gate, up) share one computation.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quantlab.errors import ModelError
from quantlab.models import Block, LoadedModel, block_list
from quantlab.texts import calibration_autocast

StatKind = Literal["second_moment", "range", "mean", "sample"]
SAMPLE_ROWS = 256
STRIP = 256
"""Columns of x^T x that are computed at once."""


@dataclass(frozen=True)
class ActStats:
    """Statistics of one linear's input; a field is None unless its kind was asked for.

    second_moment: float32 [columns, columns], mean of x x^T (GPTQ's Hessian is twice this).
    low, high: float32 [columns], smallest and largest x of each channel ('range').
    mean_abs: float32 [columns], mean |x| of each channel ('mean').
    sample: float32 [up to 256, columns], evenly spaced rows ('sample').
    """

    tokens: int
    second_moment: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None
    mean_abs: Tensor | None = None
    sample: Tensor | None = None

    @property
    def max_abs(self) -> Tensor:
        """float32 [columns]: largest |x| of each channel; needs 'range'."""
        assert self.low is not None
        assert self.high is not None
        return torch.maximum(self.low.abs(), self.high.abs())


class _Accumulator:
    """Running sums for one input."""

    def __init__(self, kinds: frozenset[StatKind], stride: int) -> None:
        self.kinds, self.stride = kinds, stride
        self.tokens = 0
        self.square: Tensor | None = None
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.total: Tensor | None = None
        self.rows: list[Tensor] = []

    def add(self, inputs: Tensor) -> None:
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if "second_moment" in self.kinds:
            if self.square is None:
                self.square = x.new_zeros(x.shape[1], x.shape[1])
            # Symmetric: the columns right of each strip suffice, 7/12 of the work at 6 strips.
            with torch.autocast("cpu", enabled=False):
                for start in range(0, x.shape[1], STRIP):
                    stop = start + STRIP
                    self.square[start:stop, start:].addmm_(x[:, start:stop].t(), x[:, start:])
        if "range" in self.kinds:
            low, high = x.amin(0), x.amax(0)
            self.low = low if self.low is None else torch.minimum(self.low, low)
            self.high = high if self.high is None else torch.maximum(self.high, high)
        if "mean" in self.kinds:
            total = x.abs().sum(0)
            self.total = total if self.total is None else self.total + total
        if "sample" in self.kinds:
            # Continue the stride across batches, so that rows stay evenly spaced.
            self.rows.append(x[-self.tokens % self.stride :: self.stride].clone())
        self.tokens += x.shape[0]

    def result(self) -> ActStats:
        moment = None
        if self.square is not None:
            upper = self.square.triu() / self.tokens
            moment = upper + upper.triu(1).t()
        return ActStats(
            tokens=self.tokens,
            second_moment=moment,
            low=self.low,
            high=self.high,
            mean_abs=None if self.total is None else self.total / self.tokens,
            sample=torch.cat(self.rows) if self.rows else None,
        )


class _Reached(Exception):
    """Ends a forward pass once what it was run for is known."""


class BlockRunner:
    """Streams the calibration tokens through the model block by block.

    Holds the hidden states before the current block (float32 [pieces, length, width], in batches)
    and what transformers passes to each block besides them.
    """

    def __init__(self, model: LoadedModel, ids: Tensor, batch_tokens: int = 4096) -> None:
        per_batch = max(batch_tokens // ids.shape[1], 1)
        self.tokens = ids.numel()
        self._blocks = block_list(model.module, model.family)
        self._keywords: list[dict[str, Any]] = []
        base = model.module.base_model
        batches = list(ids.split(per_batch))
        # Batches of unequal size would need masks of their own; the rest runs one by one.
        if len(batches) > 1 and batches[-1].shape[0] != per_batch:
            batches[-1:] = list(batches[-1].split(1))
        self._sizes = {batch.shape[0] for batch in batches}
        self._by_size = {size: self._block_keywords(base, batches, size) for size in self._sizes}
        self.hidden = [self._first_input(base, batch) for batch in batches]

    @torch.inference_mode()
    def _block_keywords(
        self, base: nn.Module, batches: list[Tensor], size: int
    ) -> list[dict[str, Any]]:
        """What each block receives besides the hidden states, for batches of `size` pieces."""
        seen: list[dict[str, Any]] = []

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # GPT-2 passes its mask without a name.
            names = list(inspect.signature(module.forward).parameters)
            unnamed = dict(zip(names[1:], args[1:], strict=False))
            seen.append({**unnamed, **kwargs, "past_key_values": None, "use_cache": False})

        ids = next(batch for batch in batches if batch.shape[0] == size)
        handles = [b.register_forward_pre_hook(record, with_kwargs=True) for b in self._blocks]
        try:
            with calibration_autocast():
                base(ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    @torch.inference_mode()
    def _first_input(self, base: nn.Module, ids: Tensor) -> Tensor:
        found: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
            found.append(args[0])
            raise _Reached

        handle = self._blocks[0].register_forward_pre_hook(stop)
        try:
            base(ids, use_cache=False)
        except _Reached:
            pass
        finally:
            handle.remove()
        return found[0].float().clone()

    def _run(self, block: Block, hidden: Tensor) -> Tensor:
        keywords = self._by_size[hidden.shape[0]][block.index]
        with calibration_autocast():
            output = block.module(hidden, **keywords)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states

    @torch.inference_mode()
    def collect(self, block: Block, kinds: Iterable[StatKind]) -> Mapping[str, ActStats]:
        """Statistics of every linear's input, by the linear's path; the hidden states stay."""
        wanted = frozenset(kinds)
        stride = -(-self.tokens // SAMPLE_ROWS)
        sums: dict[str, _Accumulator] = {}
        leader: dict[str, str] = {}
        current: list[tuple[Tensor, str]] = []
        calls = calls_a_pass = 0

        def hook(path: str, inputs: Tensor) -> None:
            nonlocal calls
            calls += 1
            gather(path, inputs)
            if calls == calls_a_pass:
                # What follows the last linear's input (itself, first of all) changes nothing here.
                raise _Reached

        def gather(path: str, inputs: Tensor) -> None:
            for tensor, first in current:
                if tensor is inputs:
                    leader[path] = first
                    return
            current.append((inputs, path))
            leader[path] = path
            sums.setdefault(path, _Accumulator(wanted, stride)).add(inputs)

        handles = [
            linear.register_forward_pre_hook(lambda module, args, path=path: hook(path, args[0]))
            for path, linear in block.linears.items()
        ]
        try:
            for hidden in self.hidden:
                current.clear()
                calls_a_pass, calls = calls, 0
                with suppress(_Reached):
                    self._run(block, hidden)
        finally:
            for handle in handles:
                handle.remove()
        if unused := block.linears.keys() - leader.keys():
            raise ModelError(f"block {block.index} never calls {min(unused)}: not supported")
        done = {path: accumulator.result() for path, accumulator in sums.items()}
        return {path: done[first] for path, first in leader.items()}

    @torch.inference_mode()
    def advance(self, block: Block) -> None:
        """Replace the hidden states by the block's output, as the block is now (quantized)."""
        self.hidden = [self._run(block, hidden).float() for hidden in self.hidden]
