"""Any causal language model of Hugging Face transformers: hidden states in, log-probabilities out.

    model = AutoModelForCausalLM.from_pretrained(...)
    logp, entropy = causal_lm_logprob(model, input_ids, attention_mask)

This serves scoring, supervised fine-tuning (-logp.sum() / tokens) and preference losses (logp.sum(-1) per completion).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from longgrpo.loss import LogProb, linear_logprob
from longgrpo.loss.linear import DEFAULT_WORKSPACE
from longgrpo.model.head import base_model, head_of


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
    """The log-probability of each next token, with the soft cap and logit scale of the model's config.

    Args:
        model: a transformers causal language model or its PEFT wrapper. For DDP and FSDP wrap CausalLMLogProb instead,
            so that the call goes through their own forward.
        input_ids: [B, T] int64.
        attention_mask: [B, T]; None: every token counts.
        labels: [B, T] int64, not shifted, -100 for tokens that are not to be predicted; None: all of input_ids
            that attention_mask keeps.
        temperature, entropy, workspace: as linear_logprob's.
        inputs: further arguments of the backbone (position_ids, ...).

    Returns: logp, and entropy if requested, [B, T - 1] float32. [:, t] belongs to token t + 1 and is 0 if that token's
        label is negative.

    Raises:
        ValueError: the head carries a PEFT adapter, so its weight is not the whole head.
        ValueError, TypeError: as linear_logprob's.
    """
    base, head = base_model(model), head_of(model)
    if labels is None:
        labels = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, -100)
    hidden = base.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **inputs)[0]
    return linear_logprob(
        hidden[:, :-1],  # [B, T - 1, H]
        head.weight,
        labels[:, 1:],
        temperature=temperature,
        entropy=entropy,
        workspace=workspace,
        **head.options,
    )


class CausalLMLogProb(nn.Module):
    """`causal_lm_logprob` of one model as a module, for wrappers of modules: DDP, fully_shard, torch.compile."""

    def __init__(self, model: nn.Module, *, temperature: float = 1.0, entropy: bool = False) -> None:
        super().__init__()
        self.model, self.temperature, self.entropy = model, temperature, entropy

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> LogProb:
        return causal_lm_logprob(
            self.model, input_ids, attention_mask, temperature=self.temperature, entropy=self.entropy, **inputs
        )
