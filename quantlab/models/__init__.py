"""Models: the catalogue, loading, and the architecture table with its blocks and folds.

The only room (besides tests) that knows transformers' model classes.
"""

from quantlab.models.blocks import Block, apply_fold, block_list, fold_scale, get_block
from quantlab.models.catalogue import CATALOGUE, CatalogueEntry
from quantlab.models.families import FAMILIES, Family, Fold
from quantlab.models.loading import LoadedModel, context_of, load, skeleton
from quantlab.models.source import ARTIFACT_FILE, ModelSource, locate
from quantlab.models.streaming import stream

__all__ = [
    "ARTIFACT_FILE",
    "CATALOGUE",
    "FAMILIES",
    "Block",
    "CatalogueEntry",
    "Family",
    "Fold",
    "LoadedModel",
    "ModelSource",
    "apply_fold",
    "block_list",
    "context_of",
    "fold_scale",
    "get_block",
    "load",
    "locate",
    "skeleton",
    "stream",
]
