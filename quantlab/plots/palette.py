"""The colour of each method and the marker of each bit width: decided here, used everywhere.

Colours are Okabe and Ito's, which colour-blind people can tell apart; where one would vanish on a
white or on a dark page it has a second shade for that page. No figure relies on colour alone:
points and bars carry their label.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantlab.results import ResultRecord


@dataclass(frozen=True)
class Style:
    """How a method is named and drawn. `light` and `dark` are its colours on the two pages."""

    title: str
    light: str
    dark: str
    reference: bool = False


STYLES: dict[str, Style] = {
    "fp32": Style("FP32", "#000000", "#ffffff", reference=True),
    "bf16": Style("BF16", "#000000", "#ffffff", reference=True),
    "rtn": Style("RTN", "#767676", "#a3a3a3"),
    "smoothquant": Style("SmoothQuant", "#e69f00", "#e69f00"),
    "gptq": Style("GPTQ", "#0072b2", "#3a9bdc"),
    "awq": Style("AWQ", "#009e73", "#1fb58a"),
    "gguf": Style("GGUF", "#d55e00", "#ee7733"),
    "nf4": Style("NF4", "#b0568a", "#cc79a7"),
    "fp4": Style("FP4", "#d1357f", "#ff85b5"),
    "llm_int8": Style("LLM.int8()", "#3f9fd1", "#56b4e9"),
    "efficientqat": Style("EfficientQAT", "#a89a00", "#f0e442"),
    "dynamic_int8": Style("Dynamic INT8", "#8a5a2b", "#c79a6b"),
    "static_int8": Style("Static INT8", "#5b4a8a", "#a796d9"),
    "onnx_int8": Style("ONNX Runtime INT8", "#0f7681", "#4fb8c4"),
    "qat": Style("QAT", "#6b7a00", "#b5c334"),
    "mixed": Style("Mixed", "#9c2f4b", "#e07a94"),
    "gptqmodel": Style("GPTQModel", "#1d4f91", "#7db3ec"),
    "autogptq": Style("AutoGPTQ", "#4a6fa5", "#9cc0e4"),
    "autoawq": Style("AutoAWQ", "#2f7d5b", "#63c9a0"),
    "bitsandbytes": Style("bitsandbytes", "#7a4a78", "#d3a2d0"),
    "checkpoint": Style("Checkpoint", "#4d5bd1", "#8f9bff"),
}

MARKERS = {
    2: "triangle-down",
    3: "triangle-up",
    4: "square",
    5: "pentagon",
    6: "hexagon",
    8: "diamond",
    16: "circle",
    32: "star",
}

INK = {False: "#1c2430", True: "#e6e9ef"}
"""Text of figures on the light and on the dark page."""
MUTED = {False: "#5a6472", True: "#9aa4b2"}
GRID = {False: "rgba(28,36,48,0.10)", True: "rgba(230,233,239,0.12)"}
PAPER = {False: "#ffffff", True: "#161b24"}
"""What lies behind a figure (figures themselves are transparent); hover boxes use it."""


def style(method: str) -> Style:
    """The style of a method; one that is not listed gets its own name and a neutral colour."""
    return STYLES.get(method, Style(method.replace("_", " "), "#4b5563", "#b6bec9"))


def colour(method: str, dark: bool = False) -> str:
    chosen = style(method)
    return chosen.dark if dark else chosen.light


def marker(record: ResultRecord) -> str:
    """Marker of a record: shape by bits, hollow when it was simulated."""
    shape = MARKERS.get(record.bits, "circle")
    return (
        f"{shape}-open" if record.execution == "simulated" and not is_reference(record) else shape
    )


def is_reference(record: ResultRecord) -> bool:
    """Whether the record is of the model as it was, not quantized."""
    return style(record.method).reference


def label(method: str, bits: int | None, options: dict[str, object] | None = None) -> str:
    """A variant's short name for people: `GPTQ 4-bit`, `GGUF Q4_K_M`, `BF16`."""
    chosen = style(method)
    if options and "type" in options and method == "gguf":
        return f"{chosen.title} {str(options['type']).upper()}"
    if chosen.reference or bits is None:
        return chosen.title
    return f"{chosen.title} {bits}-bit"


def variant_label(variant: str) -> str:
    """The short name of a variant from its command-line form, options in brackets.

    >>> variant_label("gptq:4:act_order=false")
    'GPTQ 4-bit (act_order=false)'
    """
    method, *rest = variant.split(":")
    if method == "checkpoint":  # a path, of which the last part says enough
        name = ":".join(rest).rstrip("/\\").replace("\\", "/").rpartition("/")[2]
        return f"{style(method).title} {name}".rstrip()
    extra = [part for part in rest if "=" in part]
    plain = [part for part in rest if "=" not in part]
    head = style(method).title
    if plain:
        head += f" {plain[0]}-bit" if plain[0].isdigit() else f" {plain[0].upper()}"
    return f"{head} ({', '.join(extra)})" if extra else head


def short(record: ResultRecord) -> str:
    """The short name of a record's variant."""
    return variant_label(record.variant)
