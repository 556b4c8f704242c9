"""GPTQModel, the maintained program for GPTQ, as a row of its own beside QuantLab's `gptq`.

It quantizes in `.venv-peers/gptqmodel` on the same weights and calibration tokens; what it writes
is read and measured on QuantLab's layers. Source: https://github.com/ModelCloud/GPTQModel
"""

from __future__ import annotations

from quantlab.methods import base
from quantlab.methods.peer import GPTQPeerConfig, PeerMethod
from quantlab.peers.environments import Peer


@base.register
class GPTQModel(PeerMethod):
    name = "gptqmodel"
    title = "GPTQModel"
    paper = "github.com/ModelCloud/GPTQModel"
    summary = "GPTQ as GPTQModel does it, in its own process (make peers)."
    bits = (4, 3, 2, 8)
    needs = ("second_moment",)
    peer = Peer("GPTQModel", "gptqmodel", "gptqmodel", "gptqmodel", twin="gptq")
    peer_seconds = 60.0
    Config = GPTQPeerConfig
