"""Other programs that quantize: where they are, and running them in a process of their own.

A peer is named by a method (`quantlab.methods.gptqmodel`, …); what it is asked to do stands in one
file of `workers`, which the peer's own Python runs.
"""
