"""What one training has around it: a folder of checkpoints, progress, loss curves, the time spent.

A checkpoint is one safetensors file, written beside its name and renamed, so that a kill at any
moment leaves the earlier one whole. A training that is started again with the same folder goes on
from the last checkpoint; the folder's name says what it belongs to (its owner keys it by model,
method, configuration, tokens, seed and code).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

Report = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps)."""


class Workshop:
    """`folder` None keeps no checkpoints. `curves` maps a phase to its losses, one list for each
    part of it (a block, or the one whole): what the record keeps."""

    def __init__(self, folder: Path | None, report: Report, seed: int = 0) -> None:
        self.folder, self.report, self.seed = folder, report, seed
        self.curves: dict[str, list[list[float]]] = {}
        self._started = time.perf_counter()
        self._before = 0.0

    @property
    def earlier_seconds(self) -> float:
        """Spent on what was found in checkpoints, by the runs that were stopped."""
        return self._before

    def report_part(self, stage: str, before: int, total: int, done: int) -> None:
        """Report `done` steps of a part that begins after `before` of the stage's `total`."""
        self.report(stage, before + done, total)

    def save(self, name: str, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Keep `tensors` and `state` (JSON) under `name`. Raises: OSError on a full disk."""
        from safetensors.torch import save_file

        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.safetensors"
        partial = path.with_suffix(".partial")
        spent = self._before + time.perf_counter() - self._started
        about = {**state, "seconds": spent}
        whole = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
        save_file(whole, partial, metadata={"state": json.dumps(about)})
        partial.replace(path)

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was kept under `name`; None where there is nothing whole."""
        from safetensors import SafetensorError, safe_open

        if self.folder is None:
            return None
        path = self.folder / f"{name}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                state = json.loads(file.metadata()["state"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return None
        self._before = max(self._before, float(state["seconds"]))
        return tensors, state

    def clear(self) -> None:
        """Remove the checkpoints of a finished training."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
