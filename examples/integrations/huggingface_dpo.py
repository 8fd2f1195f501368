"""Direct preference optimization (arXiv:2305.18290) with transformers alone.

python examples/integrations/huggingface_dpo.py MODEL      # a directory or a hub id
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from longgrpo.integrations.huggingface import causal_lm_logprob

BETA = 0.5
# prompt, chosen, rejected
PREFERENCES = [("The sky is ", "blue", "square"), ("Grass is ", "green", "loud"), ("Snow is ", "white", "seven")]


def encode(model_path: str) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels [2 B, T]: the chosen completions, then the rejected ones."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    prompts = [tokenizer(prompt)["input_ids"] for prompt, *_ in PREFERENCES] * 2
    completions = [chosen for _, chosen, _ in PREFERENCES] + [rejected for *_, rejected in PREFERENCES]
    wholes = [ids + tokenizer(text)["input_ids"] for ids, text in zip(prompts, completions, strict=True)]
    batch = tokenizer.pad({"input_ids": wholes}, padding_side="right", return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, prompt in zip(labels, prompts, strict=True):
        row[: len(prompt)] = -100
    return {**batch, "labels": labels}


def completion_logp(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """[2 B]"""
    inputs = batch["input_ids"], batch["attention_mask"]
    return causal_lm_logprob(model, *inputs, labels=batch["labels"]).logp.sum(-1)


def train(model: torch.nn.Module, batch: dict[str, Tensor], steps: int, learning_rate: float) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    with torch.no_grad():
        reference = completion_logp(model, batch)
    losses = []
    for _ in range(steps):
        chosen, rejected = (completion_logp(model, batch) - reference).chunk(2)
        loss = -F.logsigmoid(BETA * (chosen - rejected)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    path = sys.argv[1]
    losses = train(AutoModelForCausalLM.from_pretrained(path), encode(path), steps=20, learning_rate=1e-5)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
