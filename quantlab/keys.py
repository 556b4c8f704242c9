"""Content keys: the same inputs and the same code have the same key, and nothing else does."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import Tensor

from quantlab.environment import code_version, machine
from quantlab.types import RunSpec, VariantSpec


def content_key(parts: dict[str, Any]) -> str:
    """24 hexadecimal digits of sha256 over the parts and the code version."""
    text = json.dumps({**parts, "code": code_version()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def artifact_key(
    fingerprint: str,
    variant: VariantSpec,
    config: dict[str, Any],
    calibration: str | None,
    ids: Tensor | None,
    seed: int,
    content: str | None = None,
) -> str:
    """Of quantized weights: model, method, its whole config, calibration tokens, seed.

    `calibration` and `ids` are None for methods that need no data; `content` identifies the files
    that an option names.
    """
    tokens = None if ids is None else hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    shape = None if ids is None else list(ids.shape)
    return content_key(
        {
            "model": fingerprint,
            "method": variant.method,
            "config": config,
            "calibration": calibration,
            "tokens": tokens,
            "shape": shape,
            "seed": seed,
            "content": content,
        }
    )


def record_key(artifact: str, spec: RunSpec, windows: list[Tensor], device: str) -> str:
    """Of a finished record: the artifact, the evaluated tokens, the prompts, and what speed
    depends on (machine, threads, device)."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(window.numpy().tobytes())
    return content_key(
        {
            "artifact": artifact,
            "windows": [len(windows), spec.window, digest.hexdigest()],
            "prompts": list(spec.prompts),
            "max_new_tokens": spec.max_new_tokens,
            "stop_strings": list(spec.stop_strings),
            "threads": spec.threads,
            "device": device,
            "cpu": machine()["cpu"],
            "versions": machine()["versions"],
        }
    )
