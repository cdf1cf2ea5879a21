"""Ways to answer requests: our engine, and others to hold it against. They know text and tokens, not benchmarks."""
