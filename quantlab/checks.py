"""What a run asks for, refused before anything starts where it cannot work."""

from __future__ import annotations

from quantlab.environment import resolve_device
from quantlab.errors import ConfigError
from quantlab.methods import METHODS, configure
from quantlab.models import locate
from quantlab.stops import check_stop_strings
from quantlab.texts import check_text
from quantlab.types import RunSpec, VariantSpec


def validate(spec: RunSpec) -> None:
    """Refuse what cannot work, before anything starts; cheap.

    Raises: ConfigError, ModelError or TextError, one message each.
    """
    if not spec.variants:
        raise ConfigError("methods: name at least one, for example bf16,rtn:4,gptq:4")
    labels = [variant.label for variant in spec.variants]
    for variant in spec.variants:
        if labels.count(variant.label) > 1:
            raise ConfigError(f"methods: {variant.label} is named twice")
        METHODS[variant.method].check(configure(variant, spec.group_size))
    for name, least in (
        ("group_size", 1),
        ("calibration_tokens", 1),
        ("calibration_length", 8),
        ("window", 8),
        ("max_new_tokens", 1),
        ("threads", 0),
    ):
        if getattr(spec, name) < least:
            raise ConfigError(f"{name}: {getattr(spec, name)}; needs at least {least}")
    if spec.eval_tokens < spec.window:
        raise ConfigError(
            f"eval_tokens: {spec.eval_tokens} is less than one window ({spec.window})"
        )
    check_stop_strings(spec.stop_strings)
    resolve_device(spec.device)
    check_text(spec.text, "evaluation", spec.window)
    if any(needs_calibration(variant, spec) for variant in spec.variants):
        check_text(spec.calibration, "calibration", spec.calibration_length)
    locate(spec.model, allow_pickle=spec.allow_pickle, trust_remote_code=spec.trust_remote_code)


def needs_calibration(variant: VariantSpec, spec: RunSpec) -> bool:
    """Whether this variant, with these options, reads calibration text."""
    return bool(METHODS[variant.method].needs_for(configure(variant, spec.group_size)))


def check_window(window: int, bos: int | None, limit: int | None) -> None:
    """Raise ConfigError for a window (and its begin token) longer than the model's context."""
    if limit is not None and window + (bos is not None) > limit:
        begin = " with its begin token" if bos is not None else ""
        raise ConfigError(f"window: {window}{begin} is more than the model's context of {limit}")
