"""The knapsack against every combination there is."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.allocation import allocate
from quantlab.errors import ConfigError

ITEM = st.lists(
    st.tuples(st.integers(1, 40), st.floats(0, 10, allow_nan=False)), min_size=1, max_size=4
)


def cheapest(items: list[list[tuple[int, float]]], capacity: int) -> float | None:
    """Least total cost over all combinations that fit, None where none does."""
    costs = [
        sum(cost for _, cost in picked)
        for picked in itertools.product(*items)
        if sum(size for size, _ in picked) <= capacity
    ]
    return min(costs, default=None)


@settings(deadline=None, max_examples=150)
@given(st.lists(ITEM, min_size=1, max_size=5), st.integers(0, 160), st.sampled_from([1, 7, 64]))
def test_the_answer_is_the_best_of_all_combinations(
    items: list[list[tuple[int, float]]], capacity: int, unit: int
) -> None:
    items = [[(size * unit, cost) for size, cost in item] for item in items]
    capacity *= unit
    sizes = [[size for size, _ in item] for item in items]
    costs = [[cost for _, cost in item] for item in items]
    best = cheapest(items, capacity)
    if best is None:
        with pytest.raises(ConfigError, match="the least possible is"):
            allocate(sizes, costs, capacity)
        return
    picked = allocate(sizes, costs, capacity)
    chosen = [item[option] for item, option in zip(items, picked, strict=True)]
    assert sum(size for size, _ in chosen) <= capacity
    assert sum(cost for _, cost in chosen) == pytest.approx(best)


def test_a_coarse_table_never_exceeds_the_capacity() -> None:
    sizes = [[101, 205, 409], [99, 203, 401], [97, 197, 397]] * 4
    costs = [[9.0, 3.0, 1.0], [5.0, 2.0, 0.5], [8.0, 1.0, 0.1]] * 4
    exact = allocate(sizes, costs, 2600)
    rough = allocate(sizes, costs, 2600, states=40)

    def total(picked: list[int], table: list[list[int]] | list[list[float]]) -> float:
        return sum(row[option] for row, option in zip(table, picked, strict=True))

    assert total(rough, sizes) <= 2600
    assert total(exact, costs) <= total(rough, costs) <= 1.3 * total(exact, costs)


def test_nothing_to_choose() -> None:
    assert allocate([], [], 10) == []
    assert allocate([[5, 3]], [[1.0, 1.0]], 3) == [1]
