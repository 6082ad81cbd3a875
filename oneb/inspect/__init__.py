"""What a run looks like: analysis of a model, plots and summary of a run directory."""
