"""Does the engine use the trained weights? Both answer a fixed prompt after every update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from longgrpo import linear_logprob
from longgrpo.config.rollout import RolloutConfig
from longgrpo.config.sampling import Sampling
from longgrpo.model.head import head_of
from longgrpo.model.packed_attention import pack_sequences, packed_hidden
from longgrpo.rollout.protocol import RolloutEngine

LENGTH = (
    72  # tokens of the prompt: whole blocks of a prefix cache (32 on the CPU, 16 on CUDA), so that a stale one shows
)
SAMPLED = 4  # tokens
# The mean |difference| that rounding explains, with a margin of ten or so: see docs/rollout.md for what is measured.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.2, "float16": 0.05}
FP8_TOLERANCE = 0.5


class EngineMismatch(RuntimeError):
    """The engine does not run the weights that are trained."""


class Probe:
    """`prompt`: any tokens; they are repeated up to LENGTH. `dtype`: the model's."""

    def __init__(self, prompt: Sequence[int], engine: RolloutEngine, config: RolloutConfig, dtype: str) -> None:
        room = min(LENGTH, engine.max_length() - SAMPLED)
        self.prompt = (list(prompt) * LENGTH)[:room]
        self.engine = engine
        self.tolerance = FP8_TOLERANCE if config.kv_cache_dtype == "fp8" else TOLERANCE[dtype]
        if engine.shared and engine.shared.exact:
            self.tolerance = 0.0

    @torch.no_grad()
    def __call__(self, model: Any) -> float:
        """The mean |logprob of the engine - logprob of `model`| of a few sampled tokens, in nats.

        Raises EngineMismatch if it is more than rounding explains.
        """
        (completion,) = self.engine.generate([self.prompt], Sampling(max_tokens=SAMPLED, ignore_eos=True), [0])
        tokens = torch.tensor(self.prompt + completion.token_ids)
        hidden = packed_hidden(model, pack_sequences(tokens, torch.arange(len(tokens)), [0, len(tokens)]))
        tokens = tokens.to(hidden.device)
        start = len(self.prompt)
        head = head_of(model)
        # Row i predicts token i + 1.
        logp, _ = linear_logprob(hidden[start - 1 : -1], head.weight, tokens[start:], **head.options)
        difference = (logp - torch.tensor(completion.logprobs, device=logp.device)).abs().mean().item()
        if not difference <= self.tolerance:  # not a number is a mismatch too
            raise EngineMismatch(
                f"on a fixed prompt the engine's logprobs are off the trainer's by {difference:.2g} nats on average, "
                f"and rounding explains {self.tolerance:.2g}: the engine does not run what is trained (an adapter that "
                "did not reach it, or twice, or at another scale; a stale prefix cache; weights packed before the "
                "update)"
            )
        return difference
