"""What models run on: memory and bandwidth of some devices, and of this machine as measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import psutil

from quantlab.errors import ConfigError

Kind = Literal["machine", "gpu", "mac", "phone", "board"]
GIB = 2**30
THIS = "this"
USABLE: dict[Kind, float] = {"gpu": 0.95, "mac": 2 / 3, "phone": 0.5, "board": 0.85}
"""Share of the memory that a model may fill; the rest is the driver's, the system's and other
programs'. Assumed, except `mac`: what Metal recommends as the most on machines this small. Of this
machine counts what is free now."""
PROBE_BYTES, PROBES = 256 * 2**20, 10
"""Read for the bandwidth (far more than a cache holds), and how often; the best counts."""


@dataclass(frozen=True)
class Device:
    """`memory` and `usable` in bytes; `bandwidth` in bytes a second, the specification's peak, or
    measured (this machine; None before it is); `source` says where they come from."""

    id: str
    title: str
    kind: Kind
    memory: int
    usable: int
    bandwidth: float | None
    source: str


def _device(id: str, title: str, kind: Kind, gib: int, gigabytes: float, source: str) -> Device:
    memory = gib * GIB
    return Device(id, title, kind, memory, int(memory * USABLE[kind]), gigabytes * 1e9, source)


TABLE: dict[str, Device] = {
    device.id: device
    for device in (
        _device(
            *("rtx3060", "RTX 3060 12 GB", "gpu", 12, 360.0),
            "NVIDIA, GeForce RTX 3060: GDDR6 15 Gbit/s × 192 bit",
        ),
        _device(
            *("rtx4090", "RTX 4090 24 GB", "gpu", 24, 1008.0),
            "NVIDIA, GeForce RTX 4090: GDDR6X 21 Gbit/s × 384 bit",
        ),
        _device(
            *("a100-40", "A100 40 GB", "gpu", 40, 1555.0), "NVIDIA A100 data sheet, 40 GB (HBM2)"
        ),
        _device(
            *("a100-80", "A100 80 GB", "gpu", 80, 2039.0),
            "NVIDIA A100 data sheet, 80 GB SXM (HBM2e)",
        ),
        _device(
            *("h100-80", "H100 80 GB", "gpu", 80, 3350.0), "NVIDIA H100 data sheet, SXM (HBM3)"
        ),
        _device(
            *("macbook-16", "MacBook Air M3 16 GB", "mac", 16, 100.0),
            "Apple, MacBook Air (M3) technical specifications",
        ),
        _device(
            *("macbook-32", "MacBook Pro M2 Pro 32 GB", "mac", 32, 200.0),
            "Apple, MacBook Pro (M2 Pro) technical specifications",
        ),
        _device(
            *("phone", "Phone 8 GB", "phone", 8, 51.2),
            "LPDDR5-6400 × 64 bit (JEDEC JESD209-5): 6.4 × 8",
        ),
        _device(
            *("pi5", "Raspberry Pi 5 8 GB", "board", 8, 17.1),
            "Raspberry Pi 5 product brief: LPDDR4X-4267 × 32 bit",
        ),
    )
}


def this_machine(bandwidth: float | None = None) -> Device:
    """This machine: its memory as the system counts it, and what is free of it now."""
    memory = psutil.virtual_memory()
    return Device(THIS, "", "machine", memory.total, memory.available, bandwidth, "psutil")


def device(id: str, bandwidth: float | None = None) -> Device:
    """A device by id; `bandwidth` (bytes a second) is this machine's. Raises: ConfigError."""
    if id == THIS:
        return this_machine(bandwidth)
    if id not in TABLE:
        raise ConfigError(f"device: unknown {id!r}; choose {', '.join((THIS, *TABLE))}")
    return TABLE[id]


def measure_bandwidth() -> float:
    """Bytes a second this machine reads from memory on all its cores; a second or less once the
    native kernels are built. Raises: ConfigError where they cannot be."""
    import torch

    from kernels import native_probe
    from kernels.build import BuildError

    data = torch.ones(PROBE_BYTES, dtype=torch.uint8)
    try:
        return max(native_probe.read_bandwidth(data) for _ in range(PROBES))
    except BuildError as error:
        raise ConfigError(f"bandwidth: it is measured by the native kernels; {error}") from None
