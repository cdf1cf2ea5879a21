"""The offloading engine: tensors, layers, tiers and sweeps. It never sees text."""
