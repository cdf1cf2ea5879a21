"""How numbers rest as bytes: codecs, their kernels, and what a token's keys and values look like under them."""
