"""What to compute and in which order: integers only, no tensors, no text."""
