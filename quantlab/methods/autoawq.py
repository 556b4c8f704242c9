"""AutoAWQ, the program of AWQ's early users, as a row of its own beside QuantLab's `awq`.

It quantizes in `.venv-peers/awq` on the same weights and calibration tokens; what it writes is read
and measured on QuantLab's layers. On a CPU it writes broken weights unless its scale search is
given a copy of the state dict (see `quantlab/peers/workers/autoawq.py`), which the row says.
Source: https://github.com/casper-hansen/AutoAWQ, no longer maintained
"""

from __future__ import annotations

from quantlab.methods import base
from quantlab.methods.peer import PeerConfig, PeerMethod
from quantlab.peers.environments import Peer


@base.register
class AutoAWQ(PeerMethod):
    name = "autoawq"
    title = "AutoAWQ"
    paper = "github.com/casper-hansen/AutoAWQ"
    summary = "AWQ as AutoAWQ does it, patched for CPUs, in its own process (make peers); slow."
    bits = (4,)
    needs = ("second_moment", "mean")
    peer = Peer("AutoAWQ", "autoawq", "awq", "autoawq", twin="awq")
    peer_seconds = 1700.0
    Config = PeerConfig
