"""The model to train: loading, LoRA, and attention over packed sequences."""

import logging
import os

# Read by huggingface_hub when it is imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")

# PEFT imports bitsandbytes if it is installed, which then complains of a kernel that nothing here calls.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
