"""Walkthrough 2: absmax, zero-point and LLM.int8() on a product that can be edited."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from quantlab.errors import ConfigError
from quantlab.learn import matrix
from quantlab.learn.matrix import Cells, Factor, Product
from quantlab.ui.lessons.base import Control, Fact, Lesson, Scene, Shown, Step, percent, short

BITS = Control("bits", "slider", 8, 3, 8, 1)


def factors(scene: Scene) -> tuple[Cells, Cells]:
    """X and W as they were edited; the slice's own where they were not (or for another slice)."""
    if scene.state.get("layer") == [scene.slice.model, scene.slice.layer]:
        x, w = (tuple(map(tuple, scene.state[name])) for name in ("x", "w"))
        return x, w
    return matrix.real_factors(scene.slice)


def drawn(scene: Scene, found: Product) -> Shown:
    x, w = factors(scene)
    limit = max((abs(one) for row in found.difference for one in row), default=0.0)
    html = scene.html(
        "lesson_matrix.html",
        x=editable(x, found.x, found.outliers),
        w=editable(w, found.w, found.outliers),
        xf=found.x,
        wf=found.w,
        result=[
            [
                {
                    "exact": short(exact),
                    "got": short(got),
                    "off": f"{got - exact:+.2g}",
                    "shade": round(100 * abs(got - exact) / limit) if limit else 0,
                }
                for exact, got in zip(*rows, strict=True)
            ]
            for rows in zip(found.exact, found.result, strict=True)
        ],
        outliers=[one + 1 for one in found.outliers],
        short=short,
    )
    return Shown(html=html, facts=facts(scene, found))


def editable(values: Cells, factor: Factor | None, outliers: tuple[int, ...]) -> list[list[Any]]:
    """Cells with their text, their code (where there is one grid), and whether they stay apart."""
    return [
        [
            {
                "text": repr(value),
                "code": None if factor is None else f"{factor.codes[row][column]:.0f}",
                "outlier": column in outliers,
            }
            for column, value in enumerate(line)
        ]
        for row, line in enumerate(values)
    ]


def facts(scene: Scene, found: Product) -> tuple[Fact, ...]:
    """This scheme's error, and beside it the others' on the same numbers."""
    x, w = factors(scene)
    bits, threshold = int(scene.values.get("bits", 8)), float(scene.values.get("threshold", 6.0))
    errors = {
        scheme: matrix.product(x, w, scheme, bits, threshold).error for scheme in matrix.SCHEMES
    }
    best = min(errors, key=lambda one: errors[one])
    return tuple(
        Fact(f"product_{scheme}", percent(error), "good" if scheme == best else "")
        for scheme, error in errors.items()
    )


def scheme(name: str) -> Callable[[Scene], Shown]:
    def draw(scene: Scene) -> Shown:
        x, w = factors(scene)
        bits = int(scene.values.get("bits", 8))
        threshold = float(scene.values.get("threshold", 6.0))
        return drawn(scene, matrix.product(x, w, name, bits, threshold))

    return draw


def edit(scene: Scene, what: str) -> dict[str, Any]:
    """`x:0:2:TEXT` types a cell anew; `reset` brings the real numbers back."""
    if what == "reset":
        return {"layer": None}
    name, row, column, text = what.split(":", 3)
    if name not in ("x", "w"):
        raise ConfigError("cell: there is no such matrix")
    both = dict(zip(("x", "w"), factors(scene), strict=True))
    both[name] = matrix.edited(both[name], int(row), int(column), text)
    return {**both, "layer": [scene.slice.model, scene.slice.layer]}


LESSON = Lesson(
    "matrix",
    (
        Step("absmax", scheme("absmax"), (BITS,), act=edit, figure=False),
        Step("zero_point", scheme("zero_point"), (BITS,), act=edit, figure=False),
        Step(
            "outliers",
            scheme("llm_int8"),
            (Control("threshold", "slider", 6, 0, 20, 0.5),),
            act=edit,
            figure=False,
        ),
    ),
)
