"""AutoGPTQ, the program that GPTQModel grew out of, as a row of its own; it needs CUDA.

It quantizes in `.venv-peers/autogptq` (requirements-peers-gptq.txt); where there is no CUDA GPU the
row says so. Source: https://github.com/AutoGPTQ/AutoGPTQ, no longer maintained
"""

from __future__ import annotations

from quantlab.methods import base
from quantlab.methods.peer import GPTQPeerConfig, PeerMethod
from quantlab.peers.environments import Peer


@base.register
class AutoGPTQ(PeerMethod):
    name = "autogptq"
    title = "AutoGPTQ"
    paper = "github.com/AutoGPTQ/AutoGPTQ"
    summary = "GPTQ as AutoGPTQ does it, in its own process; needs CUDA."
    bits = (4, 3, 2, 8)
    needs = ("second_moment",)
    peer = Peer(
        "AutoGPTQ",
        "autogptq",
        "autogptq",
        "auto-gptq",
        twin="gptq",
        install="see requirements-peers-gptq.txt; GPTQModel, its successor, runs on a CPU as well: "
        "--methods gptqmodel:4",
        gpu_only="AutoGPTQ quantizes with CUDA only, and torch finds no CUDA GPU here",
    )
    peer_seconds = 60.0
    Config = GPTQPeerConfig
