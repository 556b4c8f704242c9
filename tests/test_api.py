"""What programs may call over Gradio's API and MCP: the stateless functions, with types and words."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
from gradio.routes import App
from gradio.utils import get_function_description
from starlette.testclient import TestClient

from quantlab.ui import advisor, page, server
from quantlab.ui.lessons import api

FUNCTIONS = {function.__name__: function for function in (*api.FUNCTIONS, advisor.advise)}
MCP = importlib.util.find_spec("mcp") is not None


@pytest.fixture(scope="module")
def served() -> Iterator[TestClient]:
    """The page's routes, and MCP where its package is; nothing listens on a port."""
    with TestClient(App.create_app(page.build(), mcp_server=MCP)) as client:
        yield client


def test_only_stateless_functions_are_offered(served: TestClient) -> None:
    told = served.get("/gradio_api/info").json()
    assert set(told["named_endpoints"]) == {f"/{name}" for name in FUNCTIONS}
    assert told["unnamed_endpoints"] == {}
    for name, function in FUNCTIONS.items():
        offered = told["named_endpoints"][f"/{name}"]["parameters"]
        taken = inspect.signature(function).parameters
        assert [one["parameter_name"] for one in offered] == list(taken)
        for one in offered:
            default = taken[one["parameter_name"]].default
            assert one["parameter_has_default"] is (default is not inspect.Parameter.empty)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_is_described_as_programs_read_it(name: str) -> None:
    """Gradio takes a line for each argument, and what follows the line `Returns:`."""
    function = FUNCTIONS[name]
    told, arguments, returns = get_function_description(function)
    assert told.endswith(".")
    assert " ".join(returns).endswith(".")
    for argument, words in arguments.items():
        assert words.endswith("."), argument
    for value in inspect.signature(function).parameters.values():
        assert value.annotation is not inspect.Parameter.empty


def called(client: TestClient, name: str, *values: Any) -> Any:
    answer = client.post(f"/gradio_api/run/{name}", json={"data": list(values)})
    assert answer.status_code == 200, answer.text
    return answer.json()["data"][0]


def test_a_call_answers_by_hand_made_numbers(served: TestClient) -> None:
    found = {one["format"]: one for one in called(served, "number_formats", -1.5)}
    assert found["FP16"]["bits"] == "1" + "01111" + "1000000000"
    # 3 bits, absmax: the step is 3 / 3, and 0.4 is rounded to 0.
    rounded = called(served, "rounding_error", [3.0, 0.4, -2.0], 3, 3)
    assert rounded["rounded"] == [3.0, 0.0, -2.0]
    advice = called(served, "advise", "bundled", 1e9, 1024, 1, "phone", "edge")
    assert advice["parameters"] == pytest.approx(1e9, rel=0.05)
    wrong = served.post("/gradio_api/run/gguf_block", json={"data": [[1.0], "q4_k"]})
    assert wrong.status_code == 500
    assert "needs 256 numbers" in wrong.json()["error"]


def test_the_page_speaks_mcp_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """And starts without it where the package is missing."""
    given: dict[str, Any] = {}
    demo = page.build()
    monkeypatch.setattr(demo, "launch", lambda **options: given.update(options))
    monkeypatch.setattr(server, "services", lambda: None)
    for present in (True, False):
        monkeypatch.setattr(
            server, "find_spec", lambda name, there=present: name if there else None
        )
        server.launch(demo, [])
        assert given["mcp_server"] is present


@pytest.mark.skipif(not MCP, reason="the package mcp is not installed")
def test_the_same_functions_are_tools_over_mcp(served: TestClient) -> None:
    tools = {one["name"]: one for one in served.get("/gradio_api/mcp/schema").json()}
    assert set(tools) == set(FUNCTIONS)
    for name, function in FUNCTIONS.items():
        properties = tools[name]["inputSchema"]["properties"]
        assert set(properties) == set(inspect.signature(function).parameters)
        for one in properties.values():
            assert one["type"]
            assert one["description"]
