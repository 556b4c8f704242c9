"""What to choose for a model, a device and a use: memory, speed at best, and what others found.

Pure arithmetic on numbers; only `devices` asks the machine (free memory, and on request bandwidth).
"""

from __future__ import annotations

from quantlab.advisor.advice import USES, VARIANTS, Advice, Memory, Row, advise, kv_cache_bytes
from quantlab.advisor.devices import TABLE, THIS, Device, device, measure_bandwidth
from quantlab.advisor.shapes import CATALOGUED, SHAPES, WELL_KNOWN, ModelShape, guess, of_shape
from quantlab.advisor.sizes import WeightSize, weight_size

__all__ = [
    "CATALOGUED",
    "SHAPES",
    "TABLE",
    "THIS",
    "USES",
    "VARIANTS",
    "WELL_KNOWN",
    "Advice",
    "Device",
    "Memory",
    "ModelShape",
    "Row",
    "WeightSize",
    "advise",
    "device",
    "guess",
    "kv_cache_bytes",
    "measure_bandwidth",
    "of_shape",
    "weight_size",
]
