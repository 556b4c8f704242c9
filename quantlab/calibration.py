"""Activation statistics of a block's linears, gathered while token batches stream through it.

Only what a method asks for is kept. Every statistic is of the *input* x (float [tokens, columns])
of a linear; linears that read the same tensor (q, k, v; gate, up) share one computation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quantlab.errors import ModelError
from quantlab.models import Block, LoadedModel, block_list
from quantlab.moments import add_cross_moment, add_second_moment, as_multiplied, symmetric
from quantlab.native_blocks import native_blocks
from quantlab.observers import count_values
from quantlab.texts import calibration_autocast

StatKind = Literal[
    "second_moment", "range", "mean", "sample", "square", "cross_moment", "histogram"
]
SAMPLE_ROWS = 256
MOMENTS: frozenset[StatKind] = frozenset({"second_moment", "cross_moment"})


@dataclass(frozen=True)
class ActStats:
    """Statistics of one linear's input; a field is None unless its kind was asked for.

    second_moment: float32 [columns, columns], mean of x x^T (GPTQ's Hessian is twice this).
    low, high: float32 [columns], smallest and largest x of each channel ('range').
    mean_abs: float32 [columns], mean |x| of each channel ('mean').
    sample: float32 [up to 256, columns], evenly spaced rows ('sample').
    histogram: int64 [65536], how often x rounds to each bfloat16 number, all channels together
        ('histogram'; `quantlab.observers.bin_values` are the numbers).
    mean_square: float32 [columns], mean x^2 of each channel: the diagonal of `second_moment`
    without the cost of the rest ('square').
    cross_moment: float32 [columns, columns], mean of y x^T, where y is what the linear reads in the
    unquantized model at the same token: row j belongs to y_j, column i to x_i.
    """

    tokens: int
    second_moment: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None
    mean_abs: Tensor | None = None
    sample: Tensor | None = None
    histogram: Tensor | None = None
    mean_square: Tensor | None = None
    cross_moment: Tensor | None = None

    @property
    def max_abs(self) -> Tensor:
        """float32 [columns]: largest |x| of each channel; needs 'range'."""
        assert self.low is not None
        assert self.high is not None
        return torch.maximum(self.low.abs(), self.high.abs())


class Accumulator:
    """Running sums for one input. Moments are those of the numbers that the linear multiplies: x
    rounded to bfloat16 where linears called here do so."""

    def __init__(self, kinds: frozenset[StatKind], expected: int) -> None:
        """expected: tokens that will come in all, from which rows are sampled evenly."""
        self.kinds, self.stride = kinds, -(-expected // SAMPLE_ROWS)
        self.tokens = 0
        self.square: Tensor | None = None
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.total: Tensor | None = None
        self.rows: list[Tensor] = []
        self.counts: Tensor | None = None
        self.squares: Tensor | None = None
        self.cross: Tensor | None = None

    def add(self, inputs: Tensor, original: Tensor | None = None) -> None:
        """`original`: the same tokens' input in the unquantized model, for 'cross_moment'."""
        rows, columns = inputs.numel() // inputs.shape[-1], inputs.shape[-1]
        if self.kinds & MOMENTS:
            multiplied = as_multiplied(inputs)
            if "second_moment" in self.kinds:
                if self.square is None:
                    self.square = torch.zeros(columns, columns)
                add_second_moment(self.square, multiplied)
            if original is not None:
                if self.cross is None:
                    self.cross = torch.zeros(columns, columns)
                add_cross_moment(self.cross, as_multiplied(original), multiplied)
        if self.kinds - MOMENTS:
            self._add_values(inputs.detach().reshape(-1, columns).float())
        self.tokens += rows

    def _add_values(self, x: Tensor) -> None:
        """x: float32 [tokens, columns]."""
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
        if "histogram" in self.kinds:
            counts = count_values(x)
            self.counts = counts if self.counts is None else self.counts.add_(counts)
        if "square" in self.kinds:
            squares = x.square().sum(0)
            self.squares = squares if self.squares is None else self.squares + squares

    def result(self) -> ActStats:
        moment = None
        if self.square is not None:
            moment = symmetric(self.square.div_(self.tokens))
        return ActStats(
            tokens=self.tokens,
            second_moment=moment,
            low=self.low,
            high=self.high,
            mean_abs=None if self.total is None else self.total / self.tokens,
            sample=torch.cat(self.rows) if self.rows else None,
            histogram=self.counts,
            mean_square=None if self.squares is None else self.squares / self.tokens,
            cross_moment=None if self.cross is None else self.cross / self.tokens,
        )


class _Reached(Exception):
    """Ends a forward pass once what it was run for is known."""


Hook = Callable[[str, Tensor], None]
"""Called with the path and the input of a linear, before it runs."""


def _ignore(path: str, inputs: Tensor) -> None:
    """Nobody listens."""


@contextmanager
def _listening(block: Block, hook: Hook | None) -> Iterator[None]:
    """`hook` is called by each linear of the block while this is open."""
    handles = []
    for path, linear in block.linears.items() if hook is not None else ():

        def listen(module: nn.Module, args: tuple[Any, ...], path: str = path) -> None:
            assert hook is not None
            hook(path, args[0])

        handles.append(linear.register_forward_pre_hook(listen))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class BlockRunner:
    """Streams the calibration tokens through the model block by block.

    Holds the hidden states before the current block (float32 [pieces, length, width], in batches)
    and what transformers passes to each block besides them. With `original`, a second stream runs
    beside it that no quantized block touches: for 'cross_moment', at one more forward pass. With
    `single`, a lone piece can run as well, whatever the size of the batches.
    """

    def __init__(
        self,
        model: LoadedModel,
        ids: Tensor,
        batch_tokens: int = 4096,
        *,
        original: bool = False,
        single: bool = False,
    ) -> None:
        per_batch = max(batch_tokens // ids.shape[1], 1)
        self.tokens = ids.numel()
        self._blocks = block_list(model.module, model.family)
        model.fetch(0)
        self._keywords: list[dict[str, Any]] = []
        base = model.module.base_model
        batches = list(ids.split(per_batch))
        # Batches of unequal size would need masks of their own; the rest runs one by one.
        if len(batches) > 1 and batches[-1].shape[0] != per_batch:
            batches[-1:] = list(batches[-1].split(1))
        examples = {batch.shape[0]: batch for batch in batches}
        if single:
            examples[1] = ids[:1]
        self._by_size = {size: self._block_keywords(base, ids) for size, ids in examples.items()}
        self.hidden = [self._first_input(base, batch) for batch in batches]
        self.original = list(self.hidden) if original else None
        self._original_outputs: list[Tensor] = []
        self._native = native_blocks(model, ids.shape[1])
        self._hook: Hook = _ignore

    @torch.no_grad()
    def _block_keywords(self, base: nn.Module, ids: Tensor) -> list[dict[str, Any]]:
        """What each block receives besides the hidden states, for batches of this size.

        None of it follows from what the blocks compute. So only the first one runs, and the others
        answer what it answered: they take no time, and need not be in memory."""
        seen: list[dict[str, Any]] = []
        answer: list[Any] = []

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # GPT-2 passes its mask without a name.
            names = list(inspect.signature(type(module).forward).parameters)
            unnamed = dict(zip(names[2:], args[1:], strict=False))
            seen.append({**unnamed, **kwargs, "past_key_values": None, "use_cache": False})

        def stand_in(*_: Any, **__: Any) -> Any:
            return answer[0]

        handles = [b.register_forward_pre_hook(record, with_kwargs=True) for b in self._blocks]
        handles.append(self._blocks[0].register_forward_hook(lambda *call: answer.append(call[2])))
        others = list(self._blocks)[1:]
        try:
            for block in others:
                block.forward = stand_in
            with calibration_autocast():
                base(ids, use_cache=False)
        finally:
            for block in others:
                del block.forward
            for handle in handles:
                handle.remove()
        return seen

    @torch.no_grad()
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

    def run(self, block: Block, hidden: Tensor, hook: Hook | None = None) -> Tensor:
        """The block's output for one batch of `hidden`; gradients flow where they are enabled."""
        with calibration_autocast(), self.listening(block, hook):
            return self.call(block, hidden)

    @contextmanager
    def listening(self, block: Block, hook: Hook | None) -> Iterator[None]:
        """While this is open, `hook` is called with the input of each linear that `call` runs."""
        before, self._hook = self._hook, hook or _ignore
        try:
            with _listening(block, hook):
                yield
        finally:
            self._hook = before

    def call(self, block: Block, hidden: Tensor) -> Tensor:
        """As `run`, with the hook and the autocast that are in force already."""
        if self._native is not None and self._native.takes(block, hidden):
            return self._native.run(block, hidden, self._hook)
        output = block.module(hidden, **self._by_size[hidden.shape[0]][block.index])
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states

    @torch.no_grad()
    def collect(
        self, block: Block, kinds: Iterable[StatKind], *, advance: bool = False
    ) -> Mapping[str, ActStats]:
        """Statistics of every linear's input, by the linear's path; the hidden states stay, or with
        `advance` become the output of this same pass.

        The block must be unquantized still. Raises: ModelError for a linear that never runs.
        """
        wanted = frozenset(kinds)
        beside = self.original if "cross_moment" in wanted else None
        assert beside is not None or "cross_moment" not in wanted, "needs original=True"
        sums: dict[str, Accumulator] = {}
        leader: dict[str, str] = {}
        current: list[tuple[Tensor, str]] = []
        originals: dict[str, Tensor] = {}
        calls = calls_a_pass = 0

        def hook(path: str, inputs: Tensor) -> None:
            nonlocal calls
            calls += 1
            gather(path, inputs)
            if calls == calls_a_pass and not advance:
                # What follows the last linear's input (itself, first of all) changes nothing here.
                raise _Reached

        def gather(path: str, inputs: Tensor) -> None:
            for tensor, first in current:
                if tensor is inputs:
                    leader[path] = first
                    return
            current.append((inputs, path))
            leader[path] = path
            sums.setdefault(path, Accumulator(wanted, self.tokens)).add(inputs, originals.get(path))

        outputs, original_outputs = [], []
        for index, hidden in enumerate(self.hidden):
            if beside is not None:
                original_outputs.append(
                    self.run(block, beside[index], originals.__setitem__).float()
                )
            current.clear()
            calls_a_pass, calls = calls, 0
            with suppress(_Reached):
                output = self.run(block, hidden, hook)
                if advance:
                    outputs.append(output.float())
        self._original_outputs = original_outputs
        if advance:
            self.hidden = outputs
        check_all_ran(block, leader)
        done = {path: accumulator.result() for path, accumulator in sums.items()}
        return {path: done[first] for path, first in leader.items()}

    @torch.no_grad()
    def advance(self, block: Block) -> None:
        """Replace the hidden states by the block's output, as the block is now (quantized); the
        original stream goes on with what `collect` saw the unquantized block answer."""
        if self.original is not None and self._original_outputs:
            self.original, self._original_outputs = self._original_outputs, []
        self.hidden = [self.run(block, hidden).float() for hidden in self.hidden]


def check_all_ran(block: Block, seen: Iterable[str]) -> None:
    """Raise ModelError for a linear of the block that is not among those `seen`."""
    if unused := block.linears.keys() - set(seen):
        raise ModelError(f"block {block.index} never calls {min(unused)}: not supported")
