"""Where QuantLab keeps what it makes: results, artifacts, rebuilt models."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def home() -> Path:
    """`$QUANTLAB_HOME`, else the user's data folder for quantlab. Nothing is created."""
    chosen = os.environ.get("QUANTLAB_HOME")
    return Path(chosen).expanduser() if chosen else platformdirs.user_data_path("quantlab")


def find(name: str) -> Path | None:
    """The file or folder that a person named (`~` is theirs), None where there is none."""
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, no such user, a NUL
        return None
