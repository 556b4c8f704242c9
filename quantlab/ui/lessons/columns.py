"""Walkthrough 5: GPTQ, column by column, beside plain rounding."""

from __future__ import annotations

from quantlab.learn import columns
from quantlab.plots.lessons import columns as figures
from quantlab.ui.lessons.base import Control, Fact, Lesson, Scene, Shown, Step, percent

BITS = Control("bits", "slider", 3, 2, 8, 1)


def pull(scene: Scene) -> Shown:
    column = int(scene.values["column"])
    found = columns.pull(scene.slice, column, float(scene.values["damping"]))
    return Shown(
        figure=figures.pull(found, scene.slice.first, scene.say, scene.client.dark),
        facts=(
            Fact("taken", percent(found.taken), "good"),
            Fact("strongest", f"{found.strongest:.2f}"),
        ),
    )


def walk(scene: Scene) -> Shown:
    found = columns.walk(scene.slice, int(scene.values["bits"]))
    done = min(int(scene.values["done"]), len(found.steps) - 1)
    step = found.steps[done]
    return Shown(
        figure=figures.walk(found, done, scene.say, scene.client.dark),
        facts=(
            Fact("error_gptq", percent(step.error), "good" if step.error < step.rtn_error else ""),
            Fact("error_rtn", percent(step.rtn_error)),
            Fact(
                "codes_moved",
                f"{int((found.codes[:, :done] != found.rtn_codes[:, :done]).sum())} / "
                f"{found.codes[:, :done].numel()}",
            ),
        ),
    )


def against(scene: Scene) -> Shown:
    found = columns.against(
        scene.slice,
        int(scene.values["bits"]),
        int(scene.values["group_size"]),
        float(scene.values["damping"]),
        bool(scene.values["act_order"]),
    )
    closed = 1 - found.gptq_unseen / found.rtn_unseen if found.rtn_unseen else 0.0
    return Shown(
        figure=figures.against(found, scene.say, scene.client.dark),
        facts=(
            Fact("closed", f"{100 * closed:,.0f}%", "good" if closed > 0 else "bad"),
            Fact("fit_gap", f"{found.gptq_unseen / max(found.gptq, 1e-12):.1f}×"),
        ),
    )


LESSON = Lesson(
    "columns",
    (
        Step(
            "pull",
            pull,
            (
                Control("column", "slider", 0, 0, columns.COLUMNS - 2, 1),
                Control("damping", "slider", 0.1, 0.01, 1, 0.01),
            ),
        ),
        Step("walk", walk, (Control("done", "slider", 12, 0, columns.COLUMNS, 1), BITS)),
        Step(
            "against",
            against,
            (
                Control("bits", "slider", 4, 2, 8, 1),
                Control("group_size", "radio", 64, choices=(32, 64, 128, 256)),
                Control("damping", "slider", 0.1, 0.01, 1, 0.01),
                Control("act_order", "check", True),
            ),
        ),
    ),
)
