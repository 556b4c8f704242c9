"""What a run is measured under, as its records say it: machine, model, texts and their hashes."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any

from torch import Tensor

from quantlab.environment import default_threads, machine, network_available, resolve_device
from quantlab.models import LoadedModel, ModelSource, get_block
from quantlab.texts import TokenText, calibration_ids
from quantlab.types import Emit, Notice, RunSpec


def environment(spec: RunSpec) -> dict[str, Any]:
    """Machine, versions and settings a run is measured under."""
    return {
        **machine(),
        "threads": spec.threads or default_threads(),
        "device": resolve_device(spec.device),
        "network": network_available(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": spec.seed,
    }


def described_environment(
    spec: RunSpec, source: ModelSource, text: TokenText, windows: int
) -> dict[str, Any]:
    """The environment of a record: machine, model and text by their hashes."""
    return {
        **environment(spec),
        "model": {"name": spec.model, "fingerprint": source.fingerprint},
        "text": {"name": spec.text, "sha256": text.sha256, "windows": windows},
        "window": spec.window,
        "eval_tokens": windows * spec.window,
    }


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Token ids int64 [pieces, length], what they came from, and the linear of a block with the
    widest input, whose second moment has full rank only with as many tokens as channels."""

    ids: Tensor
    name: str
    sha256: str
    widest_layer: str
    widest_input: int

    def to_json(self, *, moments: bool) -> dict[str, Any]:
        """The widest input only for a method that reads second moments."""
        tokens, length = self.ids.numel(), self.ids.shape[1]
        read = {"name": self.name, "sha256": self.sha256, "tokens": tokens, "length": length}
        widest = {"widest_layer": self.widest_layer, "widest_input": self.widest_input}
        return read | widest if moments else read


def read_calibration(model: LoadedModel, spec: RunSpec, emit: Emit) -> Calibration:
    """The calibration text as tokens. Raises: TextError, ConfigError."""
    length = spec.calibration_length
    ids, sha256 = calibration_ids(
        model, spec.calibration, spec.calibration_tokens, length, spec.seed, emit
    )
    if ids.numel() < spec.calibration_tokens // length * length:
        emit(Notice(f"the calibration text gave {ids.numel()} tokens, fewer than asked for"))
    linears = get_block(model.module, model.family, 0).linears
    widest = max(linears, key=lambda path: linears[path].in_features)
    return Calibration(ids, spec.calibration, sha256, widest, linears[widest].in_features)
