"""Causal KL divergence: what the whole model loses when one linear alone is quantized.

For each linear, the value is the KL divergence that a comparison gives the variant

    mixed:arithmetic=rtn:attention_bits=16:feed_forward_bits=16:pattern=<linear>=<bits>

on the same text: same windows, same engine, all positions, the mean of the same segments, in nats a
token. It holds what the engine's 16-bit arithmetic costs by itself; that is measured once, with
nothing quantized, and told beside it (`floor`). The engine is opened once, and one linear after the
other is exchanged in it.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlab.environment import default_threads, machine
from quantlab.errors import ConfigError
from quantlab.inspection.exchange import Engine, KeptReference
from quantlab.keys import content_key
from quantlab.learn import capture as learn
from quantlab.learn.capture import Watch
from quantlab.methods import METHODS, configure
from quantlab.metrics.quality import Reference, Scorer, measure_quality, reference_states
from quantlab.models import (
    LoadedModel,
    ModelSource,
    block_list,
    context_of,
    get_block,
    load,
    locate,
)
from quantlab.packing import PackedWeight
from quantlab.paths import home
from quantlab.sensitivity import alone
from quantlab.texts import tokenize
from quantlab.types import OptionValue, VariantSpec, ignore

BUNDLED = Path(__file__).resolve().parents[2] / "assets" / "inspect"
"""What was measured of the bundled model, made by `scripts/inspect_assets.py`."""


@dataclass(frozen=True)
class Setting:
    """How linears are quantized (round to nearest, zero-point) and on what they are measured: the
    first `tokens` tokens of an evaluation text in windows of `window`."""

    bits: int = 4
    group_size: int = 64
    text: str = "project"
    tokens: int = 1024
    window: int = 512

    def variant(self, name: str) -> VariantSpec:
        """The variant of a comparison that quantizes this linear alone."""
        options: dict[str, OptionValue] = {
            "arithmetic": "rtn",
            "attention_bits": 16,
            "feed_forward_bits": 16,
            "pattern": f"{name}={self.bits}",
        }
        return VariantSpec("mixed", None, tuple(sorted(options.items())))


Cell = tuple[float, float, float]
"""KL divergence and its 95 percent interval, nats a token."""


@dataclass(frozen=True)
class Causal:
    """What was measured of a model in one setting. `floor`: KL divergence of the same engine with
    nothing quantized; `cells` by the linear's name (`12.mlp.down_proj`)."""

    model: str
    fingerprint: str
    setting: Setting
    machine: str
    date: str
    kernel: str
    floor: float
    cells: dict[str, Cell]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Causal:
        cells = {name: (cell[0], cell[1], cell[2]) for name, cell in data["cells"].items()}
        return cls(**{**data, "setting": Setting(**data["setting"]), "cells": cells})


def read(path: Path) -> Causal | None:
    """What is in a file of measurements, None where there is nothing whole."""
    try:
        return Causal.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def keep(path: Path, found: Causal) -> None:
    """Written beside and renamed, so that no half-written file is ever found. Raises: OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found.to_json(), separators=(",", ":")) + "\n", encoding="utf-8")
    partial.replace(path)


def folder_of(fingerprint: str) -> Path:
    """Where the measurements of a model lie that this code makes on this machine."""
    cpu, versions = machine()["cpu"], machine()["versions"]
    key = content_key({"causal": fingerprint, "cpu": cpu, "versions": versions})
    return home() / "inspect" / f"kl-{key}"


def file_of(fingerprint: str, setting: Setting) -> Path:
    name = f"{setting.bits}-{setting.group_size}-{setting.tokens}-{setting.window}"
    text = "" if setting.text == "project" else "-" + content_key({"text": setting.text})[:8]
    return folder_of(fingerprint) / f"{name}{text}.json"


def known(fingerprint: str, shipped: bool) -> list[tuple[Causal, bool]]:
    """What is known of a model, and whether it came with QuantLab: measured here first, of these
    the latest."""
    here = [one for path in folder_of(fingerprint).glob("*.json") if (one := read(path))]
    found = [(one, False) for one in sorted(here, key=lambda one: one.date, reverse=True)]
    if shipped:
        files = sorted(BUNDLED.glob("kl-*.json"))
        found += [(one, True) for path in files if (one := read(path))]
    return [(one, came) for one, came in found if one.fingerprint == fingerprint]


def measure(
    source: ModelSource, setting: Setting, names: Sequence[str], watch: Watch
) -> tuple[Path, Causal]:
    """Measure these linears (all where none is named), and keep each as soon as it is known; those
    that were kept before are not measured again.

    Raises: ConfigError for a linear that is not there, ModelError, TextError.
    """
    torch.set_num_threads(default_threads())
    watch("load_model", 0, 1)
    windows, reference, packed, bos = _prepared(source, setting, names, watch)
    path = file_of(source.fingerprint, setting)
    found = read(path)
    module = load(source, dtype=torch.bfloat16)
    engine = Engine(module, bos)

    def divergence(scorer: Scorer) -> Cell:
        measured = measure_quality(scorer, windows, reference, "causal", ignore)
        interval = measured.kl_divergence_ci or (float("nan"), float("nan"))
        value = measured.kl_divergence
        return (float("nan") if value is None else value, *interval)

    if found is None:
        with engine.unquantized() as scorer:
            floor, _, _ = divergence(scorer)
        cpu = str(machine().get("cpu") or machine().get("system"))
        found = Causal(source.name, source.fingerprint, setting, cpu, "", engine.kernel, floor, {})
    for done, (name, weight) in enumerate(packed.items()):
        watch("causal", done, len(packed))
        if name in found.cells:
            continue
        with engine.quantized(name, weight) as scorer:
            cells = {**found.cells, name: divergence(scorer)}
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        found = dataclasses.replace(found, cells=cells, date=now, kernel=engine.kernel)
        keep(path, found)
    watch("causal", len(packed), len(packed))
    return path, found


def _prepared(
    source: ModelSource, setting: Setting, names: Sequence[str], watch: Watch
) -> tuple[list[Tensor], Reference, dict[str, PackedWeight], int | None]:
    """The windows, the original's states there, and the packed weight of each linear; the original
    itself is then no longer in memory."""
    model = load(source)
    text = tokenize(model.tokenizer, setting.text, "evaluation")
    windows = text.windows(setting.tokens, setting.window)
    limit = context_of(source)
    if limit is not None and setting.window + (text.bos is not None) > limit:
        raise ConfigError(f"window: {setting.window} is more than the model's context of {limit}")
    watch("reference", 0, 1)
    reference = KeptReference.of(reference_states(model, windows, text.bos, ignore))
    return windows, reference, pack(model, setting, names, watch), text.bos


@torch.no_grad()
def pack(
    model: LoadedModel, setting: Setting, names: Sequence[str], watch: Watch = lambda *_: None
) -> dict[str, PackedWeight]:
    """The packed weight of each of these linears, in the model's order; of all where none is named.

    Raises: ConfigError for a linear that is not there."""
    config = configure(VariantSpec("rtn", setting.bits), setting.group_size)
    wanted, found = set(names), {}
    count = len(block_list(model.module, model.family))
    example = ""
    for index in range(count):
        watch("quantize", index, count)
        block = get_block(model.module, model.family, index)
        for path in block.linears:
            name = example = f"{index}.{path}"
            if not wanted or name in wanted:
                packed = METHODS["rtn"].quantize_block(alone(block, path), {}, config)
                found[name] = packed[path]
    if unknown := sorted(wanted - found.keys()):
        raise ConfigError(
            f"linears: no linear of this model is called {unknown[0]}; they are called like "
            f"{example}"
        )
    return found


def fitting(source: ModelSource, tokens: int, window: int) -> int:
    """`window`, or as many tokens as there are, or as the model's context holds beside a begin
    token."""
    limit = context_of(source)
    return min(window, tokens, window if limit is None else limit - 1)


def main(arguments: list[str] | None = None) -> int:
    """Do it and return the exit code: 0, or 2 for an error a person can meet."""
    parser = learn.parser("quantlab.inspection.causal", __doc__)
    plain = Setting()
    for name in ("bits", "tokens", "window"):
        parser.add_argument(f"--{name}", type=int, default=getattr(plain, name))
    parser.add_argument("--linears", nargs="*", default=[])
    given = parser.parse_args(arguments)

    def work(watch: Watch) -> Path:
        source = locate(given.model)
        window = fitting(source, given.tokens, given.window)
        setting = Setting(bits=given.bits, tokens=given.tokens, window=window)
        return measure(source, setting, given.linears, watch)[0]

    return learn.serve("inspection", given.parent, work)


if __name__ == "__main__":
    sys.exit(main())
