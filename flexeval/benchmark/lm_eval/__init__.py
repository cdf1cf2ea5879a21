"""Tasks of lm-evaluation-harness from its YAML files: prompts built, metrics computed, none of their code run."""
