"""Training with quantized weights: what the methods that learn have in common.

fake_quant   rounding in the forward pass, straight-through gradients in the backward pass
linears      linears under training: all of weight, step and zero-point, or the steps alone
start        grids and weights that training begins with
loops        one block against its original, and the whole model against text or original
workshop     checkpoints, progress and loss curves of one training
"""
