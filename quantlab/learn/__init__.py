"""What the Learn tab computes: one file a walkthrough, functions of tensors to frozen records.

Everything runs on a `Slice` (`quantlab.learn.material`): a real piece of one linear's weight and of
the activations it reads. The arithmetic is that of the methods themselves.
"""
