"""Weights that someone else quantized, as a variant beside QuantLab's own.

A folder in GPTQ, AWQ or compressed-tensors format runs on QuantLab's layers, a .gguf file in
llama.cpp, and a folder that `quantize` wrote as it was measured. Nothing is quantized here, so
there is no arithmetic; the tokens must be those of the model that is compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlab.calibration import ActStats
from quantlab.errors import ConfigError, MethodError, ModelError
from quantlab.ggml.mixes import FILE_TYPES
from quantlab.methods import base
from quantlab.models import ARTIFACT_FILE, Block, ModelSource, hub, locate
from quantlab.models.gguf_header import read_header
from quantlab.models.json_files import read_json
from quantlab.models.quantization import quantization_of
from quantlab.models.source import HUB_ID
from quantlab.packing import PackedWeight
from quantlab.paths import find

KINDS = ("checkpoint", "gguf", "quantlab", "hub")
UNKNOWN_BITS = 0
"""Bits of files that do not say how many; a record needs a number."""


@dataclass(frozen=True)
class CheckpointConfig(base.Config):
    path: str = base.option(
        "",
        "Folder, .gguf file or Hub id",
        "Weights quantized elsewhere: a folder (or Hub id) in GPTQ, AWQ or compressed-tensors "
        "format, a folder that quantize wrote, or a .gguf file.",
    )


@base.register
class Checkpoint(base.Quantizer):
    name = "checkpoint"
    title = "Checkpoint"
    paper = "GPTQ, AWQ, compressed-tensors, GGUF"
    summary = "Weights that others quantized, from a folder or a .gguf file; nothing is changed."
    reads_files = True
    Config = CheckpointConfig

    def check(self, config: CheckpointConfig) -> None:
        try:
            self._locate(config)
        except ModelError as error:
            reason = str(error).removeprefix("model: ")
            raise ConfigError(f"methods: checkpoint: {reason}", error.hint) from None

    def content(self, config: CheckpointConfig) -> str:
        return self._locate(config).fingerprint

    def _locate(self, config: CheckpointConfig) -> ModelSource:
        """Raises: ModelError."""
        if not config.path.strip():
            raise ModelError(
                "model: no path; name a folder of quantized weights or a .gguf file, for example "
                "checkpoint:smollm2-gptq"
            )
        source = locate(config.path)
        plain = source.kind == "hub" and hub.quantized_config(source.name) is None
        if source.kind not in KINDS or plain:
            raise ModelError(f"model: {config.path} is not quantized; compare it as --model")
        return source

    def weight_bits(self, config: CheckpointConfig) -> int:
        return self._bits(config)[0]

    def activation_bits(self, config: CheckpointConfig) -> int:
        return self._bits(config)[1]

    def _bits(self, config: CheckpointConfig) -> tuple[int, int]:
        """(weight, activation) bits, as far as the files say."""
        name = config.path.strip()
        try:
            path = find(name) if name else None
            if path is None and HUB_ID.fullmatch(name):
                path = hub.quantized_config(name)
            if path is None:
                return UNKNOWN_BITS, 16
            if path.is_file():
                return _gguf_bits(path), 16
            if (path / ARTIFACT_FILE).is_file():
                return _artifact_bits(path)
            found = quantization_of(path)
        except ModelError:  # whoever opens the files says what is wrong with them
            return UNKNOWN_BITS, 16
        return (UNKNOWN_BITS, 16) if found is None else (found.bits, found.activation_bits)

    def quantize_block(
        self, block: Block, stats: Mapping[str, ActStats], config: CheckpointConfig
    ) -> dict[str, PackedWeight]:
        raise MethodError("checkpoint: its weights are quantized already")


def _gguf_bits(path: Path) -> int:
    field = read_header(path).fields.get("general.file_type")
    number = None if field is None else int(field.values[0])
    return next((t.bits for t in FILE_TYPES.values() if t.ftype == number), UNKNOWN_BITS)


def _artifact_bits(path: Path) -> tuple[int, int]:
    """What the method that wrote the folder says of its config."""
    about = read_json(path / ARTIFACT_FILE)
    method = base.registry().get(str(about.get("method")))
    config: Any = about.get("config")
    if method is None or not isinstance(config, dict):
        return UNKNOWN_BITS, 16
    try:
        made: Any = method.Config(**config)
    except TypeError:
        return UNKNOWN_BITS, 16
    return method.weight_bits(made), method.activation_bits(made)
