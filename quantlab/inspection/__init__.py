"""What the Inspect tab computes: where a model's activations stand out, and what each of its
linears costs when it alone is quantized.

`survey` are the statistics of every linear, `capture` the process that takes them; `causal`
measures KL divergences as a comparison would, in the engine of `exchange`; `detail` is the
arithmetic behind one chosen linear.
"""
