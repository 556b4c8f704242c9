"""What a folder says about how its weights were quantized, for every format that it reads.

Read from `quantization_config` in config.json, or from the files that stood for it before:
quantize_config.json (AutoGPTQ) and quant_config.json (AutoAWQ). Only what QuantLab can run is let
through; everything else is one ModelError that says what it is.
Sources: AutoGPTQ and GPTQModel (`QuantizeConfig`), AutoAWQ (`AwqConfig`), compressed-tensors
(`QuantizationConfig`), transformers (`BitsAndBytesConfig`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from quantlab.errors import ModelError
from quantlab.models.json_files import read_json
from quantlab.packing.storage import Inputs

FormatName = Literal["gptq", "awq", "compressed-tensors", "bitsandbytes"]
NAMES: tuple[FormatName, ...] = get_args(FormatName)
LEGACY: dict[str, FormatName] = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
GPTQ_BITS = (2, 3, 4, 8)
LARGEST_GROUP = 65536
_NESTED = re.compile(r"\([^()]*[+*}][^()]*\)\s*[+*{]")
"""Repetitions of repetitions, on which a search can take for ever."""


@dataclass(frozen=True)
class Scheme:
    """How some linears are stored. `group_size` None: a grid a row (or, with `one_scale`, a grid a
    matrix). `targets`: names, `re:` patterns or class names; empty for all linears. `int8`: codes
    as int8, not packed into words."""

    bits: int
    group_size: int | None
    symmetric: bool
    one_scale: bool = False
    activation: Inputs | None = None
    targets: tuple[str, ...] = ()
    int8: bool = False


@dataclass(frozen=True)
class Quantization:
    """`zero_offset`: GPTQ files of version 1 store zero-points minus 1. `by_layer`: some linears
    may have other bits or groups than the scheme says; their shapes tell. `other_bits`: which.
    `threshold`: the magnitude from which LLM.int8() leaves an input column in 16 bits."""

    format: FormatName
    schemes: tuple[Scheme, ...]
    zero_offset: int = 0
    by_layer: bool = False
    other_bits: tuple[int, ...] = ()
    threshold: float = 6.0

    @property
    def bits(self) -> int:
        """The fewest bits of any scheme."""
        return min([*(scheme.bits for scheme in self.schemes), *self.other_bits])

    @property
    def activation_bits(self) -> int:
        return 8 if any(scheme.activation for scheme in self.schemes) else 16

    def scheme_of(self, path: str) -> Scheme:
        """The scheme of the linear `path`: by its name or a pattern, else by its class."""
        if len(self.schemes) == 1:
            return self.schemes[0]
        for scheme in self.schemes:
            if any(_names(target, path) for target in scheme.targets):
                return scheme
        return next((s for s in self.schemes if "Linear" in s.targets), self.schemes[0])


def quantization_of(folder: Path) -> Quantization | None:
    """None where the folder's weights are not quantized.

    Raises: ModelError for a method, version or setting that QuantLab does not read.
    """
    config = read_json(folder / "config.json")
    settings = config.get("quantization_config", config.get("compression_config"))
    fallback: str | None = None
    if settings is None:
        found = next((name for name in LEGACY if (folder / name).is_file()), None)
        if found is None:
            return None
        settings, fallback = read_json(folder / found), LEGACY[found]
    if not isinstance(settings, dict):
        raise ModelError(f"model: {folder.name}: quantization_config is no JSON object")
    return _Reader(folder.name, settings).read(fallback)


@dataclass(frozen=True)
class _Reader:
    """One folder's settings; every refusal names the folder."""

    folder: str
    settings: Mapping[str, Any]

    def read(self, fallback: str | None) -> Quantization:
        method = self.settings.get("quant_method", self.settings.get("method", fallback))
        if method == "gptq":
            return self._gptq()
        if method == "awq":
            return self._awq()
        if method == "compressed-tensors":
            return self._compressed_tensors()
        if method == "bitsandbytes":
            return self._bitsandbytes()
        raise self.refuse(f"is quantized by {method!r}; QuantLab reads {', '.join(NAMES)} and GGUF")

    def refuse(self, reason: str) -> ModelError:
        return ModelError(f"model: {self.folder} {reason}"[:400])

    def _gptq(self) -> Quantization:
        settings = self.settings
        kind = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        if settings.get("is_marlin_format") or kind not in ("gptq", "gptq_v2"):
            raise self.refuse(
                f"has GPTQ weights in the layout {kind!r}; QuantLab reads gptq (v1, v2)"
            )
        if settings.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
            raise self.refuse(f"packs its codes into {settings['pack_dtype']!r}, not int32")
        bits = self.integer("bits", settings.get("bits"), GPTQ_BITS)
        group = self.group(settings.get("group_size", -1))
        symmetric = self.boolean("sym", settings.get("sym", True))
        offset = 1 if kind == "gptq" else 0
        dynamic = settings.get("dynamic") or {}
        if not isinstance(dynamic, dict):
            raise self.refuse("has settings by layer (dynamic) that are no JSON object")
        own = [one["bits"] for one in dynamic.values() if isinstance(one, dict) and "bits" in one]
        others = tuple(self.integer("bits", value, GPTQ_BITS) for value in own)
        scheme = Scheme(bits, group, symmetric)
        return Quantization("gptq", (scheme,), offset, bool(dynamic), others)

    def _awq(self) -> Quantization:
        settings = self.settings
        kind = str(settings.get("version") or settings.get("format") or "gemm").lower()
        if kind != "gemm":
            raise self.refuse(f"has AWQ weights in the layout {kind!r}; QuantLab reads gemm")
        bits = self.integer("bits", settings.get("bits", settings.get("w_bit")), (4,))
        group = self.group(settings.get("group_size", settings.get("q_group_size", -1)))
        if not self.boolean("zero_point", settings.get("zero_point", True)):
            raise self.refuse("has AWQ weights without zero-points, which no reader defines")
        return Quantization("awq", (Scheme(bits, group, False),))

    def _compressed_tensors(self) -> Quantization:
        settings = self.settings
        for name in ("kv_cache_scheme", "sparsity_config", "transform_config"):
            value = settings.get(name)
            if value and not (isinstance(value, dict) and value.get("format") == "dense"):
                raise self.refuse(f"has a {name}, which QuantLab does not run")
        status = settings.get("quantization_status", "compressed")
        if status != "compressed":
            raise self.refuse(f"has quantization_status {status!r}; QuantLab reads 'compressed'")
        groups = settings.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise self.refuse("has no config_groups in its quantization_config")
        return Quantization("compressed-tensors", tuple(map(self._scheme, groups.values())))

    def _bitsandbytes(self) -> Quantization:
        settings = self.settings
        four, eight = (
            self.boolean(name, settings.get(name, False))
            for name in ("load_in_4bit", "load_in_8bit")
        )
        if four == eight:
            raise self.refuse("says neither or both of load_in_4bit and load_in_8bit")
        storage = settings.get("bnb_4bit_quant_storage", "uint8")
        if four and storage != "uint8":
            raise self.refuse(f"keeps its codes in {storage!r:.40}; QuantLab reads uint8")
        if self.boolean(
            "llm_int8_has_fp16_weight", settings.get("llm_int8_has_fp16_weight", False)
        ):
            raise self.refuse("has llm_int8_has_fp16_weight: its weights are not quantized")
        threshold = settings.get("llm_int8_threshold", 6.0)
        if type(threshold) not in (int, float) or not 0 <= threshold <= 1e6:
            raise self.refuse(f"has llm_int8_threshold {threshold!r:.40}, which is no magnitude")
        scheme = Scheme(4 if four else 8, None, True, activation=None if four else "token")
        return Quantization("bitsandbytes", (scheme,), threshold=float(threshold))

    def _scheme(self, group: object) -> Scheme:
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            raise self.refuse("has a config group without settings for weights")
        kind = group.get("format") or self.settings.get("format")
        if kind not in ("pack-quantized", "int-quantized", "naive-quantized"):
            raise self.refuse(
                f"has weights in the layout {kind!r}; QuantLab reads pack-quantized, "
                "int-quantized and naive-quantized"
            )
        if group.get("output_activations"):
            raise self.refuse("quantizes the outputs of linears, which QuantLab does not run")
        weights = group["weights"]
        if weights.get("type", "int") != "int":
            raise self.refuse(f"has weights of type {weights.get('type')!r}; QuantLab reads int")
        int8 = kind != "pack-quantized"
        bits = self.integer("num_bits", weights.get("num_bits"), (8,) if int8 else range(2, 9))
        size = weights.get("group_size")
        strategy = weights.get("strategy") or {None: "tensor", -1: "channel"}.get(size, "group")
        if strategy not in ("tensor", "channel", "group"):
            raise self.refuse(
                f"has weight scales by {strategy!r}; QuantLab reads channel and group"
            )
        targets = group.get("targets")
        if not isinstance(targets, list) or not all(isinstance(one, str) for one in targets):
            raise self.refuse("has a config group without targets")
        for target in targets:
            self._check_pattern(target)
        return Scheme(
            bits,
            self.group(size) if strategy == "group" else None,
            self.boolean("symmetric", weights.get("symmetric", True)),
            strategy == "tensor",
            self._inputs(group.get("input_activations")),
            tuple(targets),
            int8,
        )

    def _inputs(self, inputs: object) -> Inputs | None:
        if inputs is None:
            return None
        if not isinstance(inputs, dict) or inputs.get("type", "int") != "int":
            raise self.refuse("has inputs that are not quantized to integers")
        self.integer("num_bits of inputs", inputs.get("num_bits"), (8,))
        symmetric = self.boolean("symmetric", inputs.get("symmetric", True))
        strategy, dynamic = inputs.get("strategy") or "tensor", inputs.get("dynamic", False)
        known: dict[tuple[object, object, bool], Inputs] = {
            ("token", True, True): "token",
            ("token", True, False): "dynamic_token",
            ("tensor", True, False): "dynamic_tensor",
            ("tensor", False, True): "tensor",
            ("tensor", False, False): "tensor",
        }
        if not isinstance(strategy, str) or (strategy, dynamic, symmetric) not in known:
            raise self.refuse(
                f"quantizes inputs by {strategy!r}, dynamic {dynamic!r}, symmetric {symmetric}, "
                "which QuantLab does not run"
            )
        return known[strategy, dynamic, symmetric]

    def _check_pattern(self, target: str) -> None:
        if not target.startswith("re:"):
            return
        try:
            usable = len(target) <= 512 and not _NESTED.search(target)
            re.compile(target[3:])
        except re.error:
            usable = False
        if not usable:
            raise self.refuse(f"has a target that is no usable pattern: {target[:80]!r}")

    def integer(self, name: str, value: object, allowed: Any) -> int:
        if type(value) is not int or value not in allowed:
            listed = ", ".join(map(str, allowed))
            raise self.refuse(f"has {name} {value!r:.40}; QuantLab reads {listed}")
        return value

    def boolean(self, name: str, value: object) -> bool:
        if not isinstance(value, bool):
            raise self.refuse(f"has {name} {value!r:.40}, which is neither true nor false")
        return value

    def group(self, value: object) -> int | None:
        if type(value) is not int or not (value == -1 or 1 <= value <= LARGEST_GROUP):
            raise self.refuse(
                f"has group_size {value!r:.40}; it must be -1 (a row) or 1 to {LARGEST_GROUP}"
            )
        return None if value == -1 else value


def _names(target: str, path: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], path) is not None
    return target == path
