"""What fills the outputs of the Inspect tab: one function a view, the values in their order.

A file that is gone is one message in the first output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from quantlab.errors import QuantLabError
from quantlab.ui import inspection_views as views
from quantlab.ui.client import Client
from quantlab.ui.inspection_source import Chosen, linear_of, origin_html, slice_of, survey_of
from quantlab.ui.messages import error_message


def safely(draw: Callable[..., list[Any]], client: Client, count: int, *given: Any) -> list[Any]:
    """What `draw` gives; what is wrong as a message in the first output, and nothing in others."""
    try:
        return draw(client, *given)
    except QuantLabError as error:
        return [error_message(error, client.language), *(None for _ in range(count - 1))]


def origin(client: Client, chosen: Chosen) -> list[Any]:
    texts = [views.text_html(client, key) for key in ("outliers", "layers")]
    return [origin_html(client, chosen), *texts]


def outliers(
    client: Client, chosen: Chosen, alpha: float, bits: int, symmetric: bool, granularity: str
) -> list[Any]:
    """The whole first view."""

    def draw(client: Client) -> list[Any]:
        found = survey_of(chosen)
        one = linear_of(found, chosen)
        real = slice_of(found, one)
        grid = views.Grid(alpha, int(bits), bool(symmetric), granularity)
        return [
            views.peaks_html(client, found, one.name),
            views.note_html(client, found, one, real),
            *views.outliers(client, found, one, real, grid),
        ]

    return safely(draw, client, 6)


def moved(
    client: Client, chosen: Chosen, alpha: float, bits: int, symmetric: bool, granularity: str
) -> list[Any]:
    """What the controls of the first view change."""

    def draw(client: Client) -> list[Any]:
        found = survey_of(chosen)
        one = linear_of(found, chosen)
        grid = views.Grid(alpha, int(bits), bool(symmetric), granularity)
        return list(views.outliers(client, found, one, slice_of(found, one), grid))

    return safely(draw, client, 4)


def layers(client: Client, chosen: Chosen, measure: str, bits: int) -> list[Any]:
    """The whole second view."""

    def draw(client: Client) -> list[Any]:
        found = survey_of(chosen)
        one = linear_of(found, chosen)
        of = views.measured(found, int(bits), found.origin.model == "bundled")
        return [
            views.layers_html(client, found, one.name, measure, int(bits), of),
            *views.layer(client, one, int(bits), of),
        ]

    return safely(draw, client, 4)
