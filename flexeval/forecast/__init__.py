"""What a run would take, before any weight is loaded: `flexeval plan`."""
