"""Where the label of each point of a scatter plot goes, so that labels do not cover each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 430.0, 260.0
"""The plotting area that is planned for, in pixels; real ones are seldom smaller."""
LETTER, LINE, GAP = 6.6, 14.0, 9.0
"""Width of a letter, height of a line and distance of a label from its point, in pixels."""

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
    the heights between which a bar is drawn through each. Greedy, in the order given: each label
    takes the position that covers least of the points, bars and labels so far; among equals, the
    first of `POSITIONS`.
    """
    pixels = [(x * WIDTH, y * HEIGHT) for x, y in points]
    taken = [Box(x - 7, y - 7, x + 7, y + 7) for x, y in pixels]
    bars = [
        Box(x - 2, low * HEIGHT, x + 2, high * HEIGHT)
        for (x, _), (low, high) in zip(pixels, intervals, strict=False)
    ]
    chosen: list[str] = []
    for index, ((x, y), text) in enumerate(zip(pixels, labels, strict=True)):
        costs: dict[str, float] = {}
        for name, direction in POSITIONS.items():
            box = _box(x, y, text, direction)
            covered = sum(
                box.overlap(other)
                for other_index, other in enumerate(taken)
                if other_index != index
            )
            covered += sum(box.overlap(bar) for bar in bars)
            costs[name] = covered + 40 * box.outside()
        best = min(costs, key=lambda name: costs[name])
        chosen.append(best)
        taken.append(_box(x, y, text, POSITIONS[best]))
    return chosen
