"""The oracle of the rollout tests: the trainer's logprobs of the tokens that an engine sampled."""

from itertools import accumulate

import torch

from longgrpo.config.model import ModelConfig
from longgrpo.model.head import base_model
from longgrpo.model.packed_attention import pack_sequences, packed_hidden, use_packed_attention

SMOLLM2 = ModelConfig("smollm2-135m-instruct")
CONTEXT = 512


def packed(model, prompts, completions):
    """The trainer's hidden states [M, H] that predict the sampled tokens, packed, and those tokens [M]."""
    use_packed_attention(model)
    rows = [list(p) + c.token_ids for p, c in zip(prompts, completions, strict=True)]
    bounds = [0, *accumulate(map(len, rows))]
    batch = pack_sequences(
        torch.tensor([token for row in rows for token in row]),
        torch.cat([torch.arange(len(row)) for row in rows]),
        bounds,
    )
    spans = zip(bounds, prompts, completions, strict=False)
    at = torch.cat([s + len(p) - 1 + torch.arange(len(c.token_ids)) for s, p, c in spans])  # row i predicts token i + 1
    with torch.no_grad():
        return packed_hidden(model, batch)[at], batch.input_ids[at + 1]


def trainer_logprobs(model, prompts, completions, temperature=1.0):
    """What the trainer computes for the sampled tokens, one flat tensor in order."""
    hidden, target = packed(model, prompts, completions)
    with torch.no_grad():
        logits = base_model(model).get_output_embeddings()(hidden) / temperature
    # float64: in float32 log_softmax itself is 1e-5 too high at this vocabulary.
    return logits.double().log_softmax(-1).gather(1, target[:, None])[:, 0]


def sampled_logprobs(completions):
    return torch.tensor([logp for c in completions for logp in c.logprobs])


def assert_agrees(model, prompts, completions, temperature=1.0):
    difference = (trainer_logprobs(model, prompts, completions, temperature) - sampled_logprobs(completions)).abs()
    assert difference.mean() <= 1e-5
    assert difference.max() <= 5e-4
