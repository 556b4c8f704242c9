"""The Inspect tab for programs: Gradio's API, and MCP where it is switched on. Stateless; a wrong
argument is one message."""

from __future__ import annotations

from typing import Any

import gradio as gr

from quantlab.errors import ConfigError, QuantLabError
from quantlab.inspection import capture, detail, survey
from quantlab.inspection.survey import WIDTHS, Survey
from quantlab.models import locate
from quantlab.ui.inspection_views import MEASURES, measured, values_of


def linear_costs(model: str = "bundled", measure: str = "kl", bits: int = 4) -> dict[str, float]:
    """What rounding one linear alone costs a model, for every linear that was measured.

    Args:
        model: bundled, or a model that was read on the Inspect tab before.
        measure: output or weight (relative squared error), or kl (nats a token, whole model).
        bits: 2, 3, 4, 5, 6 or 8; rounding to nearest, zero-point, groups of 64.

    Returns:
        the value by the linear's name, such as 11.mlp.down_proj.
    """
    try:
        if measure not in MEASURES:
            raise ConfigError(f"measure: {measure}; choose {', '.join(MEASURES)}")
        if bits not in WIDTHS:
            raise ConfigError(f"bits: {bits}; choose {', '.join(map(str, WIDTHS))}")
        found = known(model)
        return values_of(found, measure, bits, measured(found, bits, model == "bundled"))
    except QuantLabError as error:
        raise gr.Error(str(error), print_exception=False) from None


def channel_maxima(
    linear: str = "11.mlp.down_proj", alpha: float = 0.5, model: str = "bundled"
) -> dict[str, Any]:
    """The largest |x| of every input channel of a linear, before and after SmoothQuant.

    Args:
        linear: its name, such as 11.mlp.down_proj.
        alpha: migration strength, 0 to 1.
        model: bundled, or a model that was read on the Inspect tab before.

    Returns:
        `before` and `after`, a number a channel; `after` is null where no scales can be folded.
    """
    try:
        found = known(model)
        if linear not in found.linears:
            like = next(iter(found.linears))
            raise ConfigError(f"linear: {linear} is not there; linears are called like {like}")
        if not 0 <= alpha <= 1:
            raise ConfigError(f"alpha: {alpha}; needs 0 to 1")
        maxima = detail.maxima(found, found.linears[linear], alpha)
    except QuantLabError as error:
        raise gr.Error(str(error), print_exception=False) from None
    after = None if maxima.smooth_inputs is None else maxima.smooth_inputs.tolist()
    return {"before": maxima.inputs.tolist(), "after": after}


def known(model: str) -> Survey:
    """The survey that ships, or one that was made before. Raises: ModelError, ConfigError."""
    if model == "bundled":
        return survey.load()
    path = capture.file_of(locate(model).fingerprint)
    if not path.is_file():
        raise ConfigError(f"model: {model} was not read yet; read it on the Inspect tab first")
    return survey.load(path)


FUNCTIONS = (linear_costs, channel_maxima)
