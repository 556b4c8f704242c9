"""Freed memory kept for the next tensor, while a loop asks for the same sizes again and again.

The GNU C library hands large blocks back to the system as soon as they are free, and the system
clears every page anew when the next tensor touches it. A forward pass of a block makes tensors of
some 10 MB by the dozen: a third of its time went there.
Source: mallopt(3). Elsewhere (macOS, Windows, musl) nothing is changed.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""The parameters' numbers in malloc.h."""
KEEP = {TRIM_THRESHOLD: 2**31 - 1, MMAP_THRESHOLD: 2**30}
USUAL = {TRIM_THRESHOLD: 2**26, MMAP_THRESHOLD: 2**25}
"""Where the library's own adjustment ends up after a few large tensors; it cannot be asked."""


@contextmanager
def kept_memory(up_to: int = KEEP[MMAP_THRESHOLD]) -> Iterator[None]:
    """While open, freed memory stays with the process; afterwards it is handed back.

    Only tensors of `up_to` bytes are kept. The larger ones, if they are few, cost little time to
    clear, and would leave holes that nothing else fills: a third of GPTQ's memory was such holes.
    """
    libc = _gnu_libc()
    if libc is None:
        yield
        return
    _set(libc, {**KEEP, MMAP_THRESHOLD: up_to})
    try:
        yield
    finally:
        _set(libc, USUAL)
        libc.malloc_trim(0)


def hand_back() -> None:
    """Give the pages of all free memory back to the system, also inside `kept_memory`.

    What stays of a block (norms, biases) lies scattered in the room that the block's large tensors
    left, so that the next block's do not quite fit there: without this, a loop over blocks grows.
    """
    libc = _gnu_libc()
    if libc is not None:
        libc.malloc_trim(0)


MANY = 2048
"""Columns from which a linear's matrices leave enough behind, in pieces that nothing else fits, for
milliseconds to be well spent on handing it back; solving takes a hundred times as long there."""


def hand_back_after(columns: int) -> None:
    """`hand_back` between two steps of solving a linear of so many columns, where it has many."""
    if columns >= MANY:
        hand_back()


def _set(libc: ctypes.CDLL, values: dict[int, int]) -> None:
    for parameter, value in values.items():
        libc.mallopt(parameter, value)  # A value that this release refuses changes nothing.


def _gnu_libc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    known = hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "malloc_trim")
    return libc if known else None
