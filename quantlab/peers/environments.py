"""Where peers live: `.venv-peers/NAME` in the checkout, made by `make peers`; and what is there."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

import quantlab

FOLDER = Path(quantlab.__file__).resolve().parents[1] / ".venv-peers"
WORKERS = Path(__file__).with_name("workers")
MAKE = "install it with `make peers` in QuantLab's folder, then run this again"


@dataclass(frozen=True)
class Peer:
    """`recipe`: its file in `workers`; `environment`: its folder in `.venv-peers`; `distribution`:
    the package that quantizes, as its registry calls it; `twin`: QuantLab's own method of the same
    kind. `gpu_only`: what to say where it needs CUDA and there is none, `install`: how to get it.
    """

    title: str
    recipe: str
    environment: str
    distribution: str
    twin: str
    install: str = MAKE
    gpu_only: str = ""

    @property
    def python(self) -> Path:
        return FOLDER / self.environment / "bin" / "python"

    @property
    def worker(self) -> Path:
        return WORKERS / f"{self.recipe}.py"

    def version(self) -> str | None:
        """What is installed, read from its metadata; None where it is not."""
        places = [str(p) for p in self.python.parents[1].glob("lib/python*/site-packages")]
        found = importlib.metadata.distributions(name=self.distribution, path=places)
        return next((one.version for one in found), None)

    def absence(self) -> str | None:
        """Why it cannot be asked, as far as files tell; None where it may."""
        place = f".venv-peers/{self.environment}"
        if not self.python.is_file():
            return f"{self.title} is not installed: there is no {place}"
        if self.version() is None:
            return f"{self.title} is not installed: {place} has no {self.distribution}"
        return None
