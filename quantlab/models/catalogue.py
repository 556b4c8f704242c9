"""Models offered by name. Anything else transformers can load works by Hub id, folder or file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """`id` is what `--model` takes; `offline` says whether it needs no network."""

    id: str
    title: str
    note: str
    parameters: int
    offline: bool = False


CATALOGUE: tuple[CatalogueEntry, ...] = (
    CatalogueEntry(
        "bundled",
        "SmolLM2-135M-Instruct (bundled)",
        "rebuilt from Q4_1 GGUF with permuted channels; needs no network",
        134_515_008,
        offline=True,
    ),
    CatalogueEntry(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "SmolLM2-135M-Instruct",
        "the Hub's original of the bundled model",
        134_515_008,
    ),
    CatalogueEntry(
        "HuggingFaceTB/SmolLM2-360M-Instruct", "SmolLM2-360M-Instruct", "Llama family", 361_821_120
    ),
    CatalogueEntry(
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "TinyLlama-1.1B-Chat", "Llama family", 1_100_048_384
    ),
    CatalogueEntry(
        "Qwen/Qwen2.5-0.5B-Instruct", "Qwen2.5-0.5B-Instruct", "Qwen2 family", 494_032_768
    ),
    CatalogueEntry("openai-community/gpt2", "GPT-2 124M", "GPT-2 family", 124_439_808),
    CatalogueEntry("facebook/opt-125m", "OPT-125M", "OPT family, in the GPTQ paper", 125_239_296),
)
