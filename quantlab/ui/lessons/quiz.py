"""Walkthrough 10: predict the ranking, then see what was measured."""

from __future__ import annotations

from typing import Any

from quantlab.learn import quiz, records
from quantlab.learn.records import Measured
from quantlab.plots import numbers, palette
from quantlab.plots.lessons import quiz as figures
from quantlab.ui.lessons.base import Fact, Lesson, Scene, Shown, Step


def measured(scene: Scene) -> Measured:
    """The run in view, if it has enough to rank, else the comparison that ships."""
    if scene.run is not None and quiz.playable(scene.run):
        return scene.run
    return records.shipped()[0]


def order(scene: Scene) -> list[str]:
    """The person's order; by name as long as nothing was moved, or for other variants."""
    names = [record.variant for record in quiz.candidates(measured(scene))]
    kept = [str(one) for one in scene.state.get("order", [])]
    return kept if sorted(kept) == sorted(names) else names


def predict(scene: Scene) -> Shown:
    found = measured(scene)
    variants = {record.variant: record for record in quiz.candidates(found)}
    rows = [
        {
            "variant": name,
            "method": variants[name].method,
            "label": palette.variant_label(name),
            "bits": numbers.bits(variants[name].bits_per_weight),
            "size": numbers.megabytes(variants[name].size_bytes),
        }
        for name in order(scene)
    ]
    return Shown(html=scene.html("lesson_quiz.html", rows=rows, measured=found))


def move(scene: Scene, what: str) -> dict[str, Any]:
    """`up:NAME` and `down:NAME` move a variant one place."""
    way, _, name = what.partition(":")
    return {"order": quiz.moved(order(scene), name, -1 if way == "up" else 1)}


def reveal(scene: Scene) -> Shown:
    found, guess = measured(scene), order(scene)
    score = quiz.score(found, guess)
    ranking = quiz.ranking(found)
    places = {record.variant: place for place, record in enumerate(ranking, 1)}
    first = ranking[0].variant
    return Shown(
        html=scene.html("lesson_measured.html", measured=found)
        + scene.html(
            "lesson_guess.html",
            rows=[
                {"label": palette.variant_label(name), "guess": at, "place": places[name]}
                for at, name in enumerate(guess, 1)
            ],
        ),
        figure=figures.ranking(ranking, scene.say, scene.client.dark),
        facts=(
            Fact("pairs_right", f"{score.right} / {score.pairs}"),
            Fact("pairs_open", str(score.open)),
            Fact("winner_found", scene.say("yes" if guess[0] == first else "no")),
        ),
    )


LESSON = Lesson(
    "quiz",
    (
        Step("predict", predict, act=move, figure=False),
        Step("reveal", reveal),
    ),
)
