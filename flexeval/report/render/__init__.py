"""One module per way to show a comparison. Knows layout; must not compute a statistic."""
