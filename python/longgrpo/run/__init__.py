"""A run's folder: checkpoints, metrics and completions, exported models."""
