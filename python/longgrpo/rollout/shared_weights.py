"""The trained model on the engine's own storage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def model_on(views: dict[str, Tensor], directory: Path) -> PreTrainedModel:
    """The model that `directory` describes, on the very tensors in `views` (checkpoint name -> tensor).

    Raises NotImplementedError where the names do not fit: an architecture that the engine lays out in a way of its own.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    some = next(iter(views.values()))
    # The parameters are left on meta. The buffers (rotary frequencies, scales) are in no checkpoint: they are made.
    with torch.device(some.device), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=some.dtype)
    if config.tie_word_embeddings:
        views = views | {"lm_head.weight": views["model.embed_tokens.weight"]}
    try:
        model.load_state_dict(views, assign=True)
    except RuntimeError as error:
        kind = type(model).__name__
        raise NotImplementedError(f"{kind} does not map onto the engine's weights; use engine: transformers") from error
    model.tie_weights()
    model.name_or_path = str(directory)
    return model.eval()
