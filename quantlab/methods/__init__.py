"""Every quantization method, found by looking through this folder.

Adding a method is adding one file here; nothing needs to be told about it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from quantlab.errors import ConfigError
from quantlab.methods.base import Quantizer, build_config, registry
from quantlab.types import NAMED_BY, OptionValue, VariantSpec

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

METHODS: Mapping[str, Quantizer] = dict(sorted(registry().items()))

__all__ = ["METHODS", "Quantizer", "configure", "parse_variant", "parse_variants"]


def parse_variant(text: str) -> VariantSpec:
    """`METHOD`, `METHOD:BITS`, `gguf:TYPE` or `checkpoint:DIR`, with options:
    `gptq:4:group_size=128:act_order=true`.

    Raises: ConfigError that names the part that is wrong.
    """
    name, *rest = [part.strip() for part in text.strip().split(":")]
    if name not in METHODS:
        raise ConfigError(f"methods: unknown method {name!r}; choose {', '.join(METHODS)}")
    bits: int | None = None
    options: dict[str, OptionValue] = {}
    if METHODS[name].reads_files:
        # Everything after the name is the path, which may hold colons.
        path = ":".join(rest).removeprefix(f"{NAMED_BY[name]}=")
        rest, options = [], {NAMED_BY[name]: path} if path else {}
    for position, part in enumerate(rest):
        key, equals, value = part.partition("=")
        if equals:
            options[key] = value
        elif position == 0 and name in NAMED_BY:
            options[NAMED_BY[name]] = part.lower()
        elif position == 0 and part.isdecimal():
            bits = int(part)
        else:
            raise ConfigError(f"methods: {text!r}: expected METHOD:BITS or key=value, got {part!r}")
    spec = VariantSpec(name, bits, tuple(sorted(options.items())))
    configure(spec)
    return spec


def parse_variants(text: str) -> tuple[VariantSpec, ...]:
    """A comma-separated list of variants; duplicates are refused."""
    variants = tuple(parse_variant(part) for part in text.split(",") if part.strip())
    if not variants:
        raise ConfigError("methods: name at least one, for example bf16,rtn:4,gptq:4")
    labels = [variant.label for variant in variants]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"methods: {label} is named twice")
    return variants


def configure(variant: VariantSpec, group_size: int | None = None) -> Any:
    """The validated `Config` of a variant. Raises: ConfigError."""
    if variant.method not in METHODS:
        raise ConfigError(
            f"methods: unknown method {variant.method!r}; choose {', '.join(METHODS)}"
        )
    return build_config(METHODS[variant.method], variant, group_size)
