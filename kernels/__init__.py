"""Compute only: linear layers on packed weights. Works on raw tensors, never imports quantlab."""
