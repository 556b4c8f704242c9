"""`models` and `methods`: what can be named on the command line."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from quantlab.cli.options import AsJson
from quantlab.cli.output import to_json
from quantlab.cli.terminal import print_rows

if TYPE_CHECKING:
    from quantlab.methods import Quantizer


def models(json: AsJson = False) -> None:
    """List the models offered by name.

    Any Hub id, folder or .gguf file works as well.
    """
    from quantlab.models import CATALOGUE

    if json:
        entries = [dataclasses.asdict(entry) for entry in CATALOGUE]
        print(to_json({"schema": 1, "models": entries}), end="")
        return
    rows = [
        (entry.id, entry.title, "offline" if entry.offline else "network", entry.note)
        for entry in CATALOGUE
    ]
    print_rows(("--model", "title", "needs", "note"), rows, left=4)


def methods(json: AsJson = False) -> None:
    """List the quantization methods, their bits and their options."""
    from quantlab.methods import METHODS

    if json:
        described = [describe(method) for method in METHODS.values()]
        print(to_json({"schema": 1, "methods": described}), end="")
        return
    for method in METHODS.values():
        print(f"{method.name}{_choices(method)}  {method.title}: {method.summary}")
        for line in option_lines(method):
            print(f"    {line}")
    for line in shared_lines():
        print(line)


def describe(method: Quantizer) -> dict[str, Any]:
    """A method as plain data, with the options its `Config` declares."""
    return {
        "name": method.name,
        "title": method.title,
        "summary": method.summary,
        "paper": method.paper,
        "bits": list(method.bits),
        "quantizes": method.quantizes,
        "needs_calibration": bool(method.needs),
        "options": [
            {"name": field.name, "default": field.default, **field.metadata}
            for field in dataclasses.fields(method.Config)
            if field.name != "bits"
        ],
    }


def option_lines(method: Quantizer) -> Iterator[str]:
    """`name=default  help (range)` for each option of the method's own."""
    from quantlab.methods.base import WeightConfig

    shared = {field.name: field.default for field in dataclasses.fields(WeightConfig)}
    for option in describe(method)["options"]:
        if shared.get(option["name"], math.nan) != option["default"]:
            yield _option_line(option)


def shared_lines() -> Iterator[str]:
    """The options that many methods have alike, below the names of these methods."""
    from quantlab.methods import METHODS
    from quantlab.methods.base import WeightConfig

    shared = {field.name: field.default for field in dataclasses.fields(WeightConfig)}
    having = [
        method
        for method in METHODS.values()
        if shared.items() <= {f.name: f.default for f in dataclasses.fields(method.Config)}.items()
    ]
    yield ", ".join(method.name for method in having)
    for option in describe(having[0])["options"]:
        if option["name"] in shared:
            yield f"    {_option_line(option)}"


def _option_line(option: Mapping[str, Any]) -> str:
    if option["choices"]:
        allowed = " | ".join(map(_plain, option["choices"]))
    elif isinstance(option["default"], bool):
        allowed = "true | false"
    else:
        low, high = option["minimum"], option["maximum"]
        ends = [
            f"from {low}" if low is not None else "",
            f"to {high}" if high is not None else "",
        ]
        allowed = " ".join(filter(None, ends))
    help = option["help"].rstrip(".")
    text = f"{option['name']}={_plain(option['default'])}  {help}"
    return f"{text} ({allowed})" if allowed else text


def _choices(method: Quantizer) -> str:
    return f":{{{','.join(map(str, method.bits))}}}" if method.bits else ""


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
