"""Bits for every linear under a size budget: a multiple-choice knapsack, solved exactly.

Each item (a linear) takes exactly one option (a width) with a size in bytes and a cost; the total
size must not exceed the capacity and the total cost is least:

    best[i][s] = min over options o of item i of  best[i-1][s - size(i, o)] + cost(i, o)

Source: Kellerer, Pferschy and Pisinger 2004, Knapsack Problems, section 11.5 (dynamic programming).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from quantlab.errors import ConfigError

STATES = 200_000
"""Most sizes the table tells apart. Exact as long as the sizes' common divisor gives no more;
beyond, sizes are rounded up, so that the answer may be 0.1% short of the best but never too big."""


def allocate(
    sizes: Sequence[Sequence[int]],
    costs: Sequence[Sequence[float]],
    capacity: int,
    states: int = STATES,
) -> list[int]:
    """The option of each item (index into its row) with the least total cost that fits.

    `sizes` (bytes) and `costs` have a row an item and an entry an option. Raises: ConfigError when
    even the smallest options exceed `capacity`.
    """
    if not sizes:
        return []
    least = [min(row) for row in sizes]
    spare = capacity - sum(least)
    if spare < 0:
        raise ConfigError(f"a budget of {capacity} bytes: the least possible is {sum(least)}")
    extra = [[size - low for size in row] for row, low in zip(sizes, least, strict=True)]
    unit = max(math.gcd(*(size for row in extra for size in row)), 1)
    spare = min(spare, sum(map(max, extra)))
    unit = max(unit, -(-spare // states))
    room = spare // unit
    best: NDArray[np.float64] = np.zeros(room + 1)
    chosen: list[NDArray[np.int8]] = []
    for row, cost in zip(extra, costs, strict=True):
        step = np.full(room + 1, np.inf)
        pick = np.zeros(room + 1, np.int8)
        for option, (size, price) in enumerate(zip(row, cost, strict=True)):
            taken = -(-size // unit)
            if taken > room:
                continue
            candidate = best[: room + 1 - taken] + price
            better = candidate < step[taken:]
            step[taken:][better] = candidate[better]
            pick[taken:][better] = option
        best = step
        chosen.append(pick)
    at = int(best.argmin())
    answer: list[int] = []
    for row, pick in zip(reversed(extra), reversed(chosen), strict=True):
        option = int(pick[at])
        answer.append(option)
        at -= -(-row[option] // unit)
    return answer[::-1]
