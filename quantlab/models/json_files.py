"""JSON files that come with models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quantlab.errors import ModelError

LARGEST = 64 * 2**20
"""Bytes of a JSON file that is read at all; the index of a model of a thousand shards has 10 MB."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises: ModelError when missing, malformed or of absurd size."""
    try:
        if path.stat().st_size > LARGEST:
            raise ModelError(f"model: {path} is larger than any such file ({LARGEST} bytes)")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"model: {path.parent} has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"model: {path} cannot be read ({error})") from None
    if not isinstance(data, dict):
        raise ModelError(f"model: {path} does not hold a JSON object")
    return data
