"""QuantLab: compare quantizations of language models, honestly and on your own machine."""

import os

__version__ = "0.1.0"

# torch's OpenMP threads spin for some 10 ms after each of their loops, on cores that the native
# kernels' own threads (or another job) then wait for. 2,000 turns are about 0.1 ms. Read when
# torch is loaded, so it is set before anything here imports it; a person's own setting stays.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
