"""What both workers share; run by a peer's own Python, so it imports nothing of QuantLab."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

PLAIN_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json")


def arguments(about: str) -> argparse.Namespace:
    """The command line of a worker, and threads set before torch is imported."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--model", type=Path, required=True, help="folder with safetensors")
    parser.add_argument("--ids", type=Path, required=True, help="JSON: lists of token ids")
    parser.add_argument("--out", type=Path, required=True, help="folder for all that is written")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=0, help="only the first N blocks; 0 is all")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(given.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"
    given.out.mkdir(parents=True, exist_ok=True)
    return given


def original_loss(folder: Path, ids: list[int]) -> float:
    """Mean negative log-likelihood of one piece, nats a token, as the peer's transformers reads the
    unquantized folder. QuantLab's side compares it with its own: configurations have changed names
    between releases of transformers, and a wrong rotary base would make the peer look bad."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), attn_implementation="eager")
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        logits = model.float()(tokens, use_cache=False).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:]))


def save_plain(weights: dict, source: Path, folder: Path) -> None:
    """Dequantized float32 weights by transformers' names, as a folder that any loader reads."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: value.detach().to(torch.float32).contiguous() for name, value in weights.items()}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    for name in PLAIN_FILES:
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)


def report(folder: Path, **facts: object) -> None:
    """What QuantLab's side reads: seconds of loading, quantizing and saving, and the settings."""
    (folder / "report.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
