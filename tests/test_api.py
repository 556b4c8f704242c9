"""What programs may call over Gradio's API and MCP is described in the words that Gradio reads."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any, cast

import gradio as gr
import pytest
from gradio.utils import get_function_description

from quantlab.ui import advisor, inspection_api, server
from quantlab.ui.lessons import api

EVERY = (*api.FUNCTIONS, *inspection_api.FUNCTIONS, advisor.advise)
FUNCTIONS = {function.__name__: function for function in EVERY}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_is_described_as_programs_read_it(name: str) -> None:
    """Gradio takes one line for each argument, and one line after `Returns:`."""
    function = FUNCTIONS[name]
    told, arguments, returns = get_function_description(function)
    assert told.endswith(".")
    assert [line[-1] for line in returns] == ["."], "MCP puts commas between lines"
    for argument, words in arguments.items():
        assert words.endswith("."), argument
    for value in inspect.signature(function).parameters.values():
        assert value.annotation is not inspect.Parameter.empty


@pytest.mark.parametrize("there", [True, False])
def test_the_page_speaks_mcp_where_it_can_and_starts_where_not(
    monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    given: dict[str, Any] = {}
    queue = SimpleNamespace(sleep_when_free=0.001, progress_update_sleep_when_free=0.01)
    demo = SimpleNamespace(_queue=queue, launch=lambda **options: given.update(options))
    monkeypatch.setattr(server, "services", lambda: None)
    monkeypatch.setattr(server, "paint", lambda *_, **__: None)
    monkeypatch.setattr(server, "find_spec", lambda name: name if there else None)
    server.launch(cast(gr.Blocks, demo), [])
    assert given["mcp_server"] is there
    assert queue.sleep_when_free >= 0.01, "Gradio would look a thousand times a second"
