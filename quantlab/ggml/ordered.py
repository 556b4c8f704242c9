"""Float32 sums added strictly one term after the other, as ggml's reference code adds them.

Its searches compare errors that often differ by a few units in the last place, so the order of the
additions decides bytes: in another order one or two blocks of a hundred come out differently.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

LANES = 64
"""Columns are best a multiple of this: four vector registers of AVX-512."""

_RUN = 16
# torch.sum over an outer dimension adds runs of 16 rows in order where columns come in whole groups
# of `LANES`, and then adds up the runs. That is how its kernel happens to be written and nothing
# that it promises, so `_sums_in_order` asks it. Elsewhere rows are added one by one.


class Terms:
    """Room for float32 terms `[size, m]` (dim 0) or `[t, size, m]` (dim 1), summed over `size`.

    A pass or two of torch.sum stand for `size` additions: fewer bytes move, and fewer calls ask for
    Python's lock, for which the threads wait.
    """

    def __init__(self, like: Tensor, dim: int = 0) -> None:
        """like: any float32 tensor of the terms' shape."""
        self.values = torch.empty_like(like, memory_format=torch.contiguous_format)
        """To be filled by the caller; `sum` spoils it."""
        size, m = like.shape[-2:]
        self._dim = dim
        whole = like.is_cpu and m % LANES == 0 and torch.get_num_threads() == 1
        run = _RUN if whole and _sums_in_order() else 1
        self._first = self.values.narrow(dim, 0, min(run, size))
        self._later = [
            (self.values.select(dim, start), self.values.narrow(dim, start, min(run, size - start)))
            for start in range(run, size, run)
        ]

    def sum(self) -> Tensor:
        """The sum, a new tensor `[m]` or `[t, m]`."""
        total = self._first.sum(self._dim)
        for row, run in self._later:
            row += total
            torch.sum(run, self._dim, out=total)
        return total


def ordered_sum(terms: Tensor) -> Tensor:
    """The sum of float32 `[size, m]` over its first dimension, `[m]`."""
    room = Terms(terms)
    room.values.copy_(terms)
    return room.sum()


@functools.cache
def _sums_in_order() -> bool:
    """Whether this torch on this processor adds runs of 16 rows one after the other."""
    generator = torch.Generator().manual_seed(0)
    for width in (LANES, 33 * LANES):
        terms = torch.randn(3, _RUN, width, generator=generator)
        total = terms[:, 0].clone()
        for row in terms.unbind(1)[1:]:
            total += row
        if not torch.equal(terms.sum(1), total) or not torch.equal(terms[0].sum(0), total[0]):
            return False
    return True


def replace_(old: Tensor, new: Tensor, mask: Tensor) -> None:
    """`old = where(mask, new, old)` in place, for float32; mask bool, may be broadcast.

    Exclusive or by bit patterns: torch.where is not vectorized and takes three times as long.
    """
    bits = mask.to(torch.int32).neg_()
    before = old.view(torch.int32)
    before ^= (before ^ new.view(torch.int32)).bitwise_and_(bits)
