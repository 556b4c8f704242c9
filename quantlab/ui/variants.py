"""The variants of the form: chips, what can be added, and each method's options from its Config."""

from __future__ import annotations

import dataclasses
import secrets
from dataclasses import dataclass
from typing import Any, cast

from quantlab.errors import ConfigError
from quantlab.methods import METHODS, configure, parse_variant
from quantlab.methods.base import SHARED_OPTIONS
from quantlab.plots import palette
from quantlab.plots.templates import render
from quantlab.plots.words import Words
from quantlab.types import OptionValue, VariantSpec

DEFAULT = ("bf16", "rtn:4", "smoothquant:8", "gptq:4", "awq:4", "gguf:q4_k_m")
IDENTITY = ("bits", "type")
"""Config fields that a chip's name already says, and that are therefore not among its options."""


@dataclass(frozen=True)
class Chip:
    """One variant of the form. `uid` stays the same while its options change."""

    uid: str
    spec: VariantSpec

    @property
    def label(self) -> str:
        """Its name without options: `GPTQ 4-bit`; files are told apart by their names."""
        if METHODS[self.spec.method].reads_files:
            return palette.variant_label(self.spec.label)
        return palette.variant_label(self.bare.label)

    @property
    def bare(self) -> VariantSpec:
        """The variant without the options that were changed in the form."""
        kept = tuple(pair for pair in self.spec.options if pair[0] in IDENTITY)
        return dataclasses.replace(self.spec, options=kept)

    @property
    def changed(self) -> bool:
        return self.spec != self.bare

    def to_json(self) -> dict[str, Any]:
        return {"uid": self.uid, **self.spec.to_json()}


def chip(spec: VariantSpec) -> Chip:
    return Chip(secrets.token_hex(4), spec)


def read(data: list[dict[str, Any]]) -> list[Chip]:
    """The chips from the form's state; methods that no longer exist are left out."""
    return [
        Chip(item["uid"], VariantSpec.from_json(item)) for item in data if item["method"] in METHODS
    ]


def write(chips: list[Chip]) -> list[dict[str, Any]]:
    return [one.to_json() for one in chips]


def defaults() -> list[dict[str, Any]]:
    """The default comparison; a method that is not there is left out."""
    names = [name for name in DEFAULT if name.partition(":")[0] in METHODS]
    return write([chip(parse_variant(name)) for name in names])


def method_choices() -> list[tuple[str, str]]:
    """Every registered method, by its title."""
    return [(method.title, name) for name, method in METHODS.items()]


def kind_choices(method: str) -> list[tuple[str, str]]:
    """What can follow the colon: bit widths, or a GGUF type; empty where there is no choice."""
    quantizer = METHODS[method]
    if quantizer.bits:
        return [(f"{bits}-bit", str(bits)) for bits in quantizer.bits]
    for field in dataclasses.fields(quantizer.Config):
        if field.name == "type" and field.metadata.get("choices"):
            return [(str(one).upper(), str(one)) for one in field.metadata["choices"]]
    return []


def default_kind(method: str) -> str | None:
    """The bits or type preselected for a method."""
    choices = [value for _, value in kind_choices(method)]
    for field in dataclasses.fields(METHODS[method].Config):
        if field.name in IDENTITY and str(field.default) in choices:
            return str(field.default)
    return choices[0] if choices else None


def add(data: list[dict[str, Any]], method: str, kind: str | None, say: Words) -> list[Any]:
    """The chips with one more. A kind that only other methods have is what the method chosen before
    had and the page still showed: it counts as none chosen. Raises: ConfigError when the variant is
    there already, or its kind was typed and is none."""
    elsewhere = {value for other in METHODS for _, value in kind_choices(other)}
    if kind in elsewhere - {value for _, value in kind_choices(method)}:
        kind = default_kind(method)
    spec = parse_variant(f"{method}:{kind}" if kind else method)
    chips = read(data)
    if spec.label in {one.spec.label for one in chips}:
        raise ConfigError(say("add_twice", name=palette.variant_label(spec.label)))
    return write([*chips, chip(spec)])


def remove(data: list[dict[str, Any]], uid: str) -> list[Any]:
    return [item for item in data if item["uid"] != uid]


def set_option(data: list[dict[str, Any]], uid: str, name: str, value: object) -> list[Any]:
    """The chips with one option changed; back at its default it is no longer an option."""
    changed = []
    for item in data:
        fields = {field.name: field for field in option_fields(item["method"])}
        if item["uid"] == uid and name in fields:
            options = dict(item["options"])
            options.pop(name, None)
            given = coerce(fields[name], value)
            if given is not None and given != default_of(fields[name]):
                options[name] = given
            item = {**item, "options": dict(sorted(options.items()))}
        changed.append(item)
    return changed


def reset_options(data: list[dict[str, Any]], uid: str) -> list[Any]:
    return [
        one.to_json() if one.uid != uid else Chip(uid, one.bare).to_json() for one in read(data)
    ]


def coerce(field: dataclasses.Field[Any], value: object) -> OptionValue | None:
    """What a control gives, in the type of the option; None where it was left empty."""
    if value is None or not str(value).strip():
        return None
    if isinstance(field.default, bool):
        return bool(value)
    if isinstance(field.default, (int, float)):
        try:
            number = float(str(value))
        except ValueError:
            return str(value)  # `configure` refuses it and says what would be right.
        whole = isinstance(field.default, int) and number.is_integer()
        return int(number) if whole else number
    return str(value)


def default_of(field: dataclasses.Field[Any]) -> OptionValue | None:
    """What an option is where the form says nothing; a group size then follows the run's."""
    if field.name == "group_size":
        return None
    return cast(OptionValue, field.default)


def option_fields(method: str) -> list[dataclasses.Field[Any]]:
    """The options of a method that can be changed, its own before those that all methods share."""
    found = [
        field
        for field in dataclasses.fields(METHODS[method].Config)
        if field.name not in IDENTITY and field.metadata
    ]
    return sorted(found, key=lambda field: field.name in SHARED_OPTIONS)


def limits(field: dataclasses.Field[Any]) -> str:
    """An option's range and what the paper uses, in brackets; '' where there is neither."""
    parts = []
    low, high = field.metadata.get("minimum"), field.metadata.get("maximum")
    if field.metadata.get("choices") is None and low is not None and high is not None:
        parts.append(f"{low:g} – {high:g}")
    if field.metadata.get("paper"):
        parts.append(f"paper: {field.metadata['paper']}")
    return f"[{'; '.join(parts)}]" if parts else ""


def specs(data: list[dict[str, Any]], group_size: int | None = None) -> tuple[VariantSpec, ...]:
    """The variants to run. Raises: ConfigError for an option out of range, or for twins."""
    found: list[VariantSpec] = []
    for one in read(data):
        configure(one.spec, group_size)
        if one.spec.label in {other.label for other in found}:
            raise ConfigError(f"methods: {one.spec.label} is named twice")
        found.append(one.spec)
    return tuple(found)


def chips_html(data: list[dict[str, Any]], language: str) -> str:
    """The chips as HTML: a button for the options, a button to remove it."""
    shown = [
        {
            "uid": one.uid,
            "method": one.spec.method,
            "label": one.label,
            "changed": one.changed,
            "options": bool(option_fields(one.spec.method)),
            "tip": f"{METHODS[one.spec.method].summary} {one.spec.label}",
        }
        for one in read(data)
    ]
    return render("chips.html", language, chips=shown)
