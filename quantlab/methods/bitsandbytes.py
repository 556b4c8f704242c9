"""bitsandbytes, the program that NF4 and LLM.int8() come from, as a row beside QuantLab's own.

It quantizes in `.venv-peers/gptqmodel` as transformers asks it to; what it writes is read and
measured on QuantLab's layers. It needs no data: the calibration tokens only show that both sides
start from the same model. Source: https://github.com/bitsandbytes-foundation/bitsandbytes
"""

from __future__ import annotations

from dataclasses import dataclass

from quantlab.codebook import CODEBOOKS
from quantlab.methods import base
from quantlab.methods.peer import PeerMethod
from quantlab.peers.environments import Peer


@dataclass(frozen=True)
class BitsAndBytesConfig(base.Config):
    bits: int = base.option(4, "Bits", "4: a table of 16 values; 8: LLM.int8().", choices=(4, 8))
    codebook: str = base.option("nf4", "Table", "What 4-bit codes stand for.", choices=CODEBOOKS)
    double_quant: bool = base.option(
        True, "Double quantization", "Keep the 4-bit codes' scales themselves in 8 bits."
    )


@base.register
class BitsAndBytes(PeerMethod):
    name = "bitsandbytes"
    title = "bitsandbytes"
    paper = "github.com/bitsandbytes-foundation/bitsandbytes"
    summary = "NF4, FP4 or LLM.int8() as bitsandbytes does it, in its own process (make peers)."
    bits = (4, 8)
    needs = ("second_moment",)
    peer = Peer("bitsandbytes", "bitsandbytes", "gptqmodel", "bitsandbytes", twin="nf4")
    peer_seconds = 10.0
    Config = BitsAndBytesConfig
