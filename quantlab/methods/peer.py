"""What the methods of other programs share: everything but their names and options.

Source of each: the peer itself, in the version that is installed; nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from quantlab.calibration import ActStats
from quantlab.errors import MethodError
from quantlab.methods import base
from quantlab.models import Block
from quantlab.packing import PackedWeight
from quantlab.peers.environments import Peer


@dataclass(frozen=True)
class PeerConfig(base.Config):
    bits: int = base.option(4, "Bits", "Bits a weight.", minimum=2, maximum=8)
    group_size: int = base.option(
        64, "Group size", "Weights that share one scale.", minimum=8, maximum=65536, paper="128"
    )


@dataclass(frozen=True)
class GPTQPeerConfig(PeerConfig):
    symmetric: bool = base.option(
        True, "Symmetric", "Grid around zero; otherwise with a zero-point."
    )
    act_order: bool = base.option(
        False, "Act-order", "Quantize the columns with the largest activations first."
    )


class PeerMethod(base.Quantizer):
    """A method is the peer, its needs and its options."""

    peer: ClassVar[Peer]

    def content(self, config: object) -> str:
        """Another release of the peer writes other weights."""
        return f"{self.peer.distribution} {self.peer.version()}"

    def whole_model(self, config: object) -> bool:
        return True

    def quantize_block(
        self, block: Block, stats: Mapping[str, ActStats], config: Any
    ) -> dict[str, PackedWeight]:
        raise MethodError(f"{self.name}: {self.peer.title} quantizes whole models, elsewhere")
