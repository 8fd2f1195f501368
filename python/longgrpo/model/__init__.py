"""The model to train: loading, LoRA, and attention over packed sequences."""
