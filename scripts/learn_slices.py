"""Make what the Learn tab ships: `python scripts/learn_slices.py [RUN.json …]`.

Writes assets/learn/bundled.safetensors, slices of two linears of the bundled model. With documents
of `quantlab compare --json`, also assets/learn/records.json: their results without outputs and
segments, losses rounded to four digits, each with the environment it was measured in.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from quantlab.learn import material
from quantlab.learn.capture import captured

LAYERS = ("10.self_attn.q_proj", "11.mlp.down_proj")
"""A quiet linear, and one whose input holds a massive activation."""

KEPT = (
    "variant",
    "method",
    "bits",
    "status",
    "perplexity",
    "perplexity_ci",
    "kl_divergence",
    "kl_divergence_ci",
    "size_bytes",
    "bits_per_weight",
    "quantize_seconds",
)


def main(runs: list[str]) -> None:
    path = captured("bundled", lambda *_: None)
    slices = {layer: material.load(path, layer) for layer in LAYERS}
    material.write(material.BUNDLED, material.origin(path), slices)
    print(f"{material.BUNDLED.name}: {material.BUNDLED.stat().st_size:,} bytes")
    if runs:
        target = material.BUNDLED.with_name("records.json")
        documents = [distilled(json.loads(Path(run).read_text("utf-8"))) for run in runs]
        target.write_text(json.dumps(documents, separators=(",", ":")) + "\n", "utf-8")
        print(f"{target.name}: {target.stat().st_size:,} bytes")


def distilled(document: dict[str, Any]) -> dict[str, Any]:
    """The document with only what lessons show."""
    results = []
    for result in document["results"]:
        kept = {key: result[key] for key in KEPT}
        kept["config"] = result["config"]
        kept["curves"] = {
            phase: [[float(f"{loss:.4g}") for loss in part] for part in parts]
            for phase, parts in result.get("curves", {}).items()
        }
        results.append(kept)
    return {"environment": document["environment"], "results": results}


if __name__ == "__main__":
    main(sys.argv[1:])
