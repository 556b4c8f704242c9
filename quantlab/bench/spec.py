"""What a benchmark measures."""

from __future__ import annotations

from dataclasses import dataclass

from quantlab.errors import ConfigError

GENERATED = "1b"
"""The name of the generated model."""

PARTS = ("decode", "prefill", "gemv", "linears")
MOST_THREADS = 256


@dataclass(frozen=True)
class BenchSpec:
    """`models` are names as `--model` takes them, or `1b`; `parts` some of PARTS. `quick` measures
    once, with fewer tokens: to see that it runs. Raises: ConfigError."""

    models: tuple[str, ...] = ("bundled", GENERATED)
    llamacpp: bool = False
    threads: tuple[int, ...] = (1, 2)
    parts: tuple[str, ...] = PARTS
    group_size: int = 64
    quick: bool = False

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError(f"model: name at least one, for example bundled,{GENERATED}")
        if not self.threads or not all(1 <= count <= MOST_THREADS for count in self.threads):
            raise ConfigError(f"threads: numbers from 1 to {MOST_THREADS}, for example 1,2")
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            raise ConfigError(f"only: {', '.join(unknown) or 'empty'}; choose {', '.join(PARTS)}")
        if self.group_size < 8:
            raise ConfigError("group-size: at least 8")
        for values in (self.models, self.threads, self.parts):
            for value in values:
                if values.count(value) > 1:
                    raise ConfigError(f"{value} is named twice; name it once")


@dataclass(frozen=True)
class Weights:
    """A row of the results: `method`, `bits` and `options` of what packs the blocks (None: bfloat16
    as they are), the GGUF type that llama.cpp runs beside it, and the parts it takes part in."""

    name: str
    method: str | None
    bits: int
    exact: bool = True
    peer: str | None = None
    parts: tuple[str, ...] = ("decode", "prefill")


BLOCKWISE = (
    Weights("q4", "rtn", 4, exact=False, peer="q4_0"),
    Weights("q4-exact", "rtn", 4, peer="q4_0"),
    Weights("q8", "rtn", 8, exact=False, peer="q8_0"),
    Weights("q8-exact", "rtn", 8, peer="q8_0"),
    Weights("q3", "rtn", 3, exact=False, parts=("decode",)),
    Weights("q2", "rtn", 2, exact=False, parts=("decode",)),
)
"""Measured together, beside llama.cpp. Inputs are int8 in blocks, as llama.cpp's; `-exact`: not."""

W8A8 = Weights("w8a8", "dynamic_int8", 8)
PLAIN = Weights("bf16", None, 16)

GOALS: dict[tuple[str, str], float] = {
    ("decode", "q4"): 1.2,
    ("decode", "q8"): 1.2,
    ("prefill", "q4"): 1.5,
    ("prefill", "w8a8"): 2.0,
    ("gemv", "q4"): 0.8,
    ("gemv", "q8"): 0.8,
    ("gemv", "q3"): 0.65,
    ("gemv", "q2"): 0.65,
    ("linears", "w8a8"): 0.6,
}
"""The least ratio, or fraction, that QuantLab aims at. Packed decode also aims at 1 times bf16."""
GENERATED_GOALS = {("decode", "q4"): 1.1}


def goal(part: str, weights: str, model: str = "") -> float | None:
    """The least ratio or fraction aimed at, None where there is no such aim."""
    if model == GENERATED and (part, weights) in GENERATED_GOALS:
        return GENERATED_GOALS[part, weights]
    return GOALS.get((part, weights))
