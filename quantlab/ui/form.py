"""The Compare form as data: its fields, the RunSpec they make, and where an error belongs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from quantlab.errors import ConfigError, ModelError, QuantLabError, TextError
from quantlab.methods import METHODS
from quantlab.plots.words import Words
from quantlab.types import RunSpec
from quantlab.ui import variants

NUMBERS = (
    "group_size",
    "calibration_tokens",
    "calibration_length",
    "eval_tokens",
    "window",
    "max_new_tokens",
    "threads",
    "seed",
)
FIELDS = (
    "model",
    "variants",
    "calibration",
    "text",
    "prompts",
    "stop_strings",
    *NUMBERS,
    "device",
    "allow_pickle",
    "trust_remote_code",
)
"""The inputs of the form in the order in which handlers receive them."""

PROMPTS = (
    "The three most important inventions of the nineteenth century were",
    "Write one short paragraph about why the sea is salty.",
)

PLACES = ("model", "variants", "texts", "prompts", "advanced", "run")
"""Where a message can stand: beside one group of controls, or beside the Run button."""

_PLACE_OF = {
    "model": "model",
    "allow_pickle": "advanced",
    "trust_remote_code": "advanced",
    "methods": "variants",
    "calibration": "texts",
    "text": "texts",
    "evaluation": "texts",
    "prompts": "prompts",
    "prompt": "prompts",
    "max_new_tokens": "prompts",
    "stop": "prompts",
    "calibration_tokens": "texts",
    "calibration_length": "texts",
    "eval_tokens": "texts",
    "window": "texts",
    "group_size": "advanced",
    "threads": "advanced",
    "seed": "advanced",
    "device": "advanced",
}


def values_of(spec: RunSpec) -> dict[str, Any]:
    """The form's values that make this spec."""
    values: dict[str, Any] = {name: getattr(spec, name) for name in FIELDS}
    values["variants"] = variants.write([variants.chip(one) for one in spec.variants])
    values["prompts"] = "\n".join(spec.prompts)
    values["stop_strings"] = "\n".join(escaped(string) for string in spec.stop_strings)
    return values


def defaults() -> dict[str, Any]:
    """What the form shows at first: one click on Run is the default comparison."""
    values = values_of(RunSpec(prompts=PROMPTS))
    values["variants"] = variants.defaults()
    return values


def restored(saved: object) -> dict[str, Any]:
    """The form as the browser kept it; what is missing or of another kind is the default."""
    values = defaults()
    if not isinstance(saved, Mapping):
        return values
    for name, value in values.items():
        kept = saved.get(name)
        if type(kept) is type(value) or (isinstance(kept, int) and isinstance(value, float)):
            values[name] = kept
    try:
        values["variants"] = variants.write(variants.read(values["variants"]))
    except (KeyError, TypeError, AttributeError):
        values["variants"] = variants.defaults()
    return values


def lines(text: str | None) -> tuple[str, ...]:
    """One prompt a line; empty lines are left out."""
    return tuple(line.strip() for line in (text or "").splitlines() if line.strip())


def escaped(string: str) -> str:
    """A stop string as its line of the form: a line break is written `\\n`, a backslash `\\\\`."""
    return string.replace("\\", "\\\\").replace("\n", "\\n")


def unescaped(lines: str | None) -> tuple[str, ...]:
    """The stop strings of the form's lines, spaces kept; empty lines are left out."""
    found = [line for line in (lines or "").split("\n") if line]
    return tuple(
        re.sub(r"\\([n\\])", lambda one: "\n" if one[1] == "n" else "\\", line) for line in found
    )


def spec_of(values: Mapping[str, Any], say: Words) -> RunSpec:
    """The comparison that the form describes.

    Raises: ConfigError that names the field, for numbers that are missing or not whole and for
    variants that cannot be.
    """
    numbers: dict[str, Any] = {name: whole(name, values[name], say) for name in NUMBERS}
    chosen = variants.specs(values["variants"], numbers["group_size"])
    if not chosen:
        raise ConfigError(f"methods: {say('error_no_variants')}")
    return RunSpec(
        model=str(values["model"] or "").strip(),
        variants=chosen,
        calibration=str(values["calibration"] or "").strip(),
        text=str(values["text"] or "").strip(),
        prompts=lines(values["prompts"]),
        stop_strings=unescaped(values["stop_strings"]),
        device=str(values["device"]),
        allow_pickle=bool(values["allow_pickle"]),
        trust_remote_code=bool(values["trust_remote_code"]),
        **numbers,
    )


def whole(name: str, value: object, say: Words) -> int:
    """A number of the form as a whole one. Raises: ConfigError that names the field."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value):
        raise ConfigError(f"{name}: {say('error_number', field=say(name))}")
    return int(value)


def place_of(error: QuantLabError) -> str:
    """Beside which controls an error is shown, from its kind and the argument it names."""
    if isinstance(error, TextError):
        return "texts"
    if isinstance(error, ModelError):
        return "model"
    if not isinstance(error, ConfigError):
        return "run"
    # `gptq:4:clip=true: group_size=0: …` is about the run's group size, because the variant's own
    # name does not set one; `group_size: …` is about a field of the form.
    text = str(error)
    first = re.split(r"[:=\s]", text.strip().lower(), maxsplit=1)[0].replace("-", "_")
    if first in METHODS:
        return "advanced" if text.count("group_size=") == 1 else "variants"
    return _PLACE_OF.get(first, "run")
