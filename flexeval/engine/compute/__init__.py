"""What is computed on the bytes: the model's layers, attention, sampling."""
