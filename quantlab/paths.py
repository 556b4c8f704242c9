"""Where QuantLab keeps what it makes: results, artifacts, rebuilt models."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def home() -> Path:
    """`$QUANTLAB_HOME`, else the user's data folder for quantlab. Nothing is created."""
    chosen = os.environ.get("QUANTLAB_HOME")
    return Path(chosen).expanduser() if chosen else platformdirs.user_data_path("quantlab")
