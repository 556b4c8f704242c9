"""Records as figures, tables, verdicts and HTML fragments; nothing here runs a model.

`palette` decides colours and markers, `words` holds the texts in every language.
"""

from quantlab.plots.figures import FIGURES, kl_bits, perplexity_size, size, speed

__all__ = ["FIGURES", "kl_bits", "perplexity_size", "size", "speed"]
