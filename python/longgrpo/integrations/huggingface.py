"""Any causal language model of Hugging Face transformers: hidden states in, log-probabilities out.

    model = AutoModelForCausalLM.from_pretrained(...)
    logp, entropy = causal_lm_logprob(model, input_ids, attention_mask)

serves scoring, supervised fine-tuning (-logp.sum() / tokens) and preference losses (logp.sum(-1) is a completion's).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from longgrpo.loss import LogProb, linear_logprob
from longgrpo.loss.linear import DEFAULT_WORKSPACE

# What a config calls the factor of its logits: Cohere, Muse Glimmer, Falcon-H1.
_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
# What it calls the C of C tanh(logits / C): Gemma and nanochat, RecurrentGemma.
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")


def head_options(config: Any) -> dict[str, float | None]:
    """What a model does to its logits, by its config: linear_logprob's `softcap` and `logit_scale`."""
    config = config.get_text_config()

    def first(names: tuple[str, ...]) -> float | None:
        return next((value for name in names if (value := getattr(config, name, None)) is not None), None)

    factor = first(_FACTORS)
    divisor = getattr(config, "logits_scaling", None)  # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies
    if factor is None and divisor is not None:
        factor = divisor if config.model_type.startswith("hyperclovax") else 1 / divisor
    return {"softcap": first(_SOFTCAPS), "logit_scale": 1.0 if factor is None else factor}


def causal_lm_logprob(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    workspace: int = DEFAULT_WORKSPACE,
    **inputs: Any,
) -> LogProb:
    """log p of each next token, with the soft cap and logit scale that the model's config names.

    Args:
        model: a transformers causal language model or its PEFT wrapper. For DDP and FSDP wrap CausalLMLogProb instead,
            so that the call goes through their own forward.
        input_ids: [B, T] int64.
        attention_mask: [B, T]; None: every token counts.
        labels: [B, T] int64, not shifted, -100 where a token is not to be predicted; None: all of input_ids that
            attention_mask leaves.
        temperature, entropy, workspace: as linear_logprob's.
        inputs: what else the backbone takes (position_ids, ...).

    Returns: logp, and entropy where asked for, [B, T - 1] float32: [:, t] is of token t + 1, and 0 where its label is
        negative.

    Raises:
        ValueError: a PEFT adapter on the head, whose weight alone would be the wrong head.
        ValueError, TypeError: as linear_logprob's.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings()
    if hasattr(head, "base_layer"):
        raise ValueError("the head carries a PEFT adapter: leave lm_head out of target_modules, or merge the adapter")
    if labels is None:
        labels = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, -100)
    hidden = base.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **inputs)[0]
    return linear_logprob(
        hidden[:, :-1],  # [B, T - 1, H]
        head.weight,
        labels[:, 1:],
        bias=getattr(head, "bias", None),
        temperature=temperature,
        entropy=entropy,
        workspace=workspace,
        **head_options(base.config),  # type: ignore[arg-type]
    )


class CausalLMLogProb(nn.Module):
    """`causal_lm_logprob` of one model as a module, for what wraps modules: DDP, fully_shard, torch.compile."""

    def __init__(self, model: nn.Module, *, temperature: float = 1.0, entropy: bool = False) -> None:
        super().__init__()
        self.model, self.temperature, self.entropy = model, temperature, entropy

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> LogProb:
        return causal_lm_logprob(
            self.model, input_ids, attention_mask, temperature=self.temperature, entropy=self.entropy, **inputs
        )
