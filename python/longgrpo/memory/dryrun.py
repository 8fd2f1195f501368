"""A model without storage, and an engine that holds only that model, for dry runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from longgrpo.model import nf4
from longgrpo.model.files import model_config


class MetaEngine:
    """A RolloutEngine whose model is on `meta`; it cannot sample."""

    name = "meta"
    shared = None

    def __init__(self, directory: Path, dtype: torch.dtype, quantization: str | None = None) -> None:
        from transformers import AutoModelForCausalLM

        config = model_config(directory)
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
            if quantization == "nf4":
                _pack(self.model)

    def attach(self, model: Any) -> None:
        """Nothing is to be sampled."""


def _pack(model: Any) -> None:
    """Every linear but the head in NF4."""
    head = model.get_output_embeddings()
    linears = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    nf4.pack_modules(model, linears)
