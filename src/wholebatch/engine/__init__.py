"""The ideas of `core` on tensors: how PyTorch does it."""
