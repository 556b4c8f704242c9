"""Which method can be written in which file format: the table in README.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from quantlab.errors import ConfigError
from quantlab.methods.base import Quantizer
from quantlab.types import OptionValue, VariantSpec


def format_table() -> str:
    """A row a method, a column a format: the bits that can be said, the option that it takes, or
    the number of the reason below."""
    from quantlab.export.formats import FORMATS
    from quantlab.methods import METHODS

    names = ("quantlab", "gguf", *FORMATS)
    reasons: dict[str, int] = {}
    lines = [f"| method | {' | '.join(f'`{name}`' for name in names)} |", "|---" * 6 + "|"]
    for method in METHODS.values():
        if not method.packs:
            continue
        cells = [_cell(method, name, reasons) for name in names]
        lines.append(f"| `{method.name}` | {' | '.join(cells)} |")
    lines.append("")
    lines += [f"{number}. {_sentence(reason)}" for reason, number in reasons.items()]
    return "\n".join(lines)


def _cell(method: Quantizer, format: str, reasons: dict[str, int]) -> str:
    widths: list[int | None] = [*sorted(method.bits)] or [None]
    said = [bits for bits in widths if _refusal(VariantSpec(method.name, bits), format) is None]
    listed = ", ".join("yes" if bits is None else str(bits) for bits in said)
    if said:
        return listed
    for option in _options(method):
        variants = (VariantSpec(method.name, bits, (option,)) for bits in widths)
        if any(_refusal(variant, format) is None for variant in variants):
            value = str(option[1])
            return f"with `{option[0]}={value.lower() if value in ('True', 'False') else value}`"
    reason = _refusal(VariantSpec(method.name, widths[-1]), format)
    assert reason is not None
    return f"no ({reasons.setdefault(reason, len(reasons) + 1)})"


def _options(method: Quantizer) -> Iterator[tuple[str, OptionValue]]:
    """Single options of the method's own with another choice than the default."""
    for field in dataclasses.fields(method.Config):
        choices = field.metadata.get("choices") or ()
        if isinstance(field.default, bool):
            choices = (not field.default,)
        if field.name not in ("bits", "type"):
            yield from ((field.name, one) for one in choices if one != field.default)


def _refusal(variant: VariantSpec, format: str) -> str | None:
    """Why the pair is refused, without the names of the two."""
    from quantlab.delivery import check_format
    from quantlab.export.formats import FORMATS

    try:
        check_format(variant, format)
    except ConfigError as error:
        text = str(error)
        if "cannot be written as" not in text:
            return text.partition(": ")[2]
        _, _, reason = text.partition(f" cannot be written as {format}")
        reason = reason.lstrip(":; ")
        if format == "gguf":
            return "only llama.cpp's own block formats run there: the method `gguf`"
        if variant.method == "gguf":
            return "blocks of ggml go into .gguf files"
        return reason.replace(f"{FORMATS[format].title} files", "its files")
    return None


def _sentence(reason: str) -> str:
    first = reason.partition(" ")[0]
    return f"{reason[0].upper() if first.isalpha() else reason[0]}{reason[1:]}."
