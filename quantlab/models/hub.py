"""Quantized models of the Hub: which ids name one, and their files."""

from __future__ import annotations

from pathlib import Path

from quantlab.errors import ModelError
from quantlab.models.quantization import LEGACY, quantization_of

PATTERNS = ["*.json", "*.safetensors", "tokenizer*", "*.model", "merges.txt", "vocab.txt"]
"""What is fetched: safetensors, configuration and tokenizer; no code and no pickles."""


def quantized_config(name: str) -> Path | None:
    """The folder with the configuration of a quantized model, None for one that is not quantized
    or that neither the cache nor the network has. Raises: ModelError as `quantization_of`."""
    from huggingface_hub import hf_hub_download

    found = None
    for file in ("config.json", *LEGACY):
        try:
            found = Path(hf_hub_download(name, file)).parent
        except Exception:  # whoever loads it says what is wrong; older files are seldom there
            if found is None:
                return None
    assert found is not None
    return found if quantization_of(found) is not None else None


def fetch(name: str) -> Path:
    """The folder with all files of a quantized model, downloaded the first time.

    Raises: ModelError.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=PATTERNS))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"model: {name} cannot be fetched ({reason})") from None
