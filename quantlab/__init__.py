"""QuantLab: compare quantizations of language models, honestly and on your own machine."""

__version__ = "0.1.0"
