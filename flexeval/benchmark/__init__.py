"""What to ask a model and how to score it: suites, packaged data, and HELM. Knows text, never tensors."""
