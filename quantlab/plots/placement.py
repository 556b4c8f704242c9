"""Where the label of each point of a scatter plot goes, so that labels do not cover each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

WIDTH, HEIGHT = 430.0, 260.0
"""The plotting area that is planned for, in pixels; real ones are seldom smaller."""
LETTER, LINE, GAP = 6.6, 14.0, 9.0
"""Width of a letter, height of a line and distance of a label from its point, in pixels."""

LABELS = 5.0
"""How much worse it is to cover another label than to cover a point or a bar."""

OUTSIDE = 40.0
"""And to leave the plotting area, for every pixel."""
ROUNDS, ORDERS = 6, 24

POSITIONS = {
    "middle right": (1.0, 0.0),
    "top center": (0.0, 1.0),
    "bottom center": (0.0, -1.0),
    "middle left": (-1.0, 0.0),
    "top right": (1.0, 1.0),
    "bottom right": (1.0, -1.0),
    "top left": (-1.0, 1.0),
    "bottom left": (-1.0, -1.0),
}


@dataclass(frozen=True)
class Box:
    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: Box) -> float:
        """The shared area in square pixels."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(0.0, width) * max(0.0, height)

    def outside(self) -> float:
        """How far the box leaves the plotting area, in pixels."""
        return (
            max(0.0, -self.left)
            + max(0.0, self.right - WIDTH)
            + max(0.0, -self.bottom)
            + max(0.0, self.top - HEIGHT)
        )


def _box(x: float, y: float, text: str, direction: tuple[float, float]) -> Box:
    width = LETTER * len(text)
    across, up = direction
    centre_x = x + across * (GAP + width / 2 if up == 0 else width / 2)
    centre_y = y + up * (GAP + LINE / 2)
    return Box(centre_x - width / 2, centre_y - LINE / 2, centre_x + width / 2, centre_y + LINE / 2)


def place(
    points: Sequence[tuple[float, float]],
    labels: Sequence[str],
    intervals: Sequence[tuple[float, float]] = (),
) -> list[str]:
    """Plotly's `textposition` for each point.

    `points` lie in the unit square (0, 0 at the lower left of the plotting area), `intervals` are
    the heights between which a bar is drawn through each. Each label in turn takes the position
    that covers least of the points, the bars and the other labels (among equals, the first of
    `POSITIONS`), until none moves any more. Where that ends depends on who begins, so some orders
    are tried, the same ones every time; the least covered result wins.
    """
    pixels = [(x * WIDTH, y * HEIGHT) for x, y in points]
    dots = [Box(x - 7, y - 7, x + 7, y + 7) for x, y in pixels]
    bars = [
        Box(x - 2, low * HEIGHT, x + 2, high * HEIGHT)
        for (x, _), (low, high) in zip(pixels, intervals, strict=False)
    ]
    choices = [
        {name: _box(x, y, text, direction) for name, direction in POSITIONS.items()}
        for (x, y), text in zip(pixels, labels, strict=True)
    ]
    fixed: list[dict[str, float]] = []
    for index, boxes in enumerate(choices):
        seen = [*bars, *(dot for at, dot in enumerate(dots) if at != index)]
        fixed.append(
            {
                name: sum(box.overlap(other) for other in seen) + OUTSIDE * box.outside()
                for name, box in boxes.items()
            }
        )
    order, shuffle = list(range(len(pixels))), Random(0).shuffle
    tries = []
    for _ in range(ORDERS):
        tries.append(_settle(order, choices, fixed))
        shuffle(order)
    return min(tries, key=lambda result: result[0])[1]


def _settle(
    order: Sequence[int], choices: list[dict[str, Box]], fixed: list[dict[str, float]]
) -> tuple[float, list[str]]:
    """(total cost, positions) when labels choose in this order until none moves any more."""
    chosen: dict[int, str] = {}
    costs: dict[int, float] = {}
    for _ in range(ROUNDS):
        before = dict(chosen)
        for index in order:
            others = [choices[at][name] for at, name in chosen.items() if at != index]
            cost = {
                name: fixed[index][name] + LABELS * sum(box.overlap(other) for other in others)
                for name, box in choices[index].items()
            }
            chosen[index] = min(cost, key=lambda name: cost[name])
            costs[index] = cost[chosen[index]]
        if chosen == before:
            break
    return sum(costs.values()), [chosen[index] for index in range(len(choices))]
