"""The model to train: loading, LoRA, and attention over packed sequences."""

import os

# Read by huggingface_hub when it is imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
