"""The language-model head, and what a model does to its logits: all that linear_logprob needs besides hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# What a config calls the factor of its logits: Cohere, Muse Glimmer, Falcon-H1.
_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
# What it calls the C of C tanh(logits / C): Gemma and nanochat, RecurrentGemma.
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")


class Head(NamedTuple):
    weight: Tensor  # [V, H]
    options: Mapping[str, Any] = MappingProxyType({})
    """linear_logprob's `bias`, `softcap` and `logit_scale`."""


def base_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model itself, whose linears PEFT has replaced if it wraps it."""
    wrapped: Any = model
    base: PreTrainedModel = wrapped.get_base_model() if hasattr(model, "get_base_model") else wrapped
    return base


def head_of(model: PreTrainedModel | PeftModel) -> Head:
    """The head of a transformers causal language model, PEFT or not. Raises ValueError if the head carries an adapter,
    because its weight is then not the whole head, and for prompt tuning, whose tokens only PEFT's own forward adds."""
    method = getattr(model, "active_peft_config", None)
    if method is not None and method.is_prompt_learning:
        raise ValueError(
            f"{method.peft_type.value} adds tokens in PEFT's own forward, which is not called here: use an adapter of "
            "the layers, such as LoRA"
        )
    base: Any = base_model(model)
    head = base.get_output_embeddings()
    if hasattr(head, "base_layer"):
        raise ValueError("the head carries a PEFT adapter: leave lm_head out of target_modules, or merge the adapter")
    return Head(head.weight, {"bias": getattr(head, "bias", None), **logit_options(base.config)})


def logit_options(config: Any) -> dict[str, float | None]:
    """What a model does to its logits, by its config: linear_logprob's `softcap` and `logit_scale`."""
    config = config.get_text_config()

    def first(names: tuple[str, ...]) -> float | None:
        return next((value for name in names if (value := getattr(config, name, None)) is not None), None)

    factor = first(_FACTORS)
    divisor = getattr(config, "logits_scaling", None)  # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies
    if factor is None and divisor is not None:
        factor = divisor if config.model_type.startswith("hyperclovax") else 1 / divisor
    return {"softcap": first(_SOFTCAPS), "logit_scale": 1.0 if factor is None else factor}
