"""Supervised fine-tuning with transformers alone: the loss of the completions, without a [tokens, vocabulary] matrix.

python examples/integrations/huggingface_sft.py MODEL      # a directory or a hub id
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from longgrpo.integrations.huggingface import causal_lm_logprob

PAIRS = [(f"{a} + {b} = ", str(a + b)) for a in range(4) for b in range(4)]


def encode(model_path: str) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels [B, T], padded on the right; the prompt has no labels."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in PAIRS]
    wholes = [ids + tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
              for ids, (_, answer) in zip(prompts, PAIRS, strict=True)]  # fmt: skip
    batch = tokenizer.pad({"input_ids": wholes}, padding_side="right", return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, prompt in zip(labels, prompts, strict=True):
        row[: len(prompt)] = -100
    return {**batch, "labels": labels}


def train(model: torch.nn.Module, batch: dict[str, Tensor], steps: int, learning_rate: float) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    losses = []
    for _ in range(steps):
        logp, _ = causal_lm_logprob(model, batch["input_ids"], batch["attention_mask"], labels=batch["labels"])
        loss = -logp.sum() / (batch["labels"][:, 1:] >= 0).sum()  # logp is 0 where there is no label
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    path = sys.argv[1]
    losses = train(AutoModelForCausalLM.from_pretrained(path), encode(path), steps=20, learning_rate=1e-4)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
