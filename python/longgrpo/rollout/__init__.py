"""Sampling completions with the current weights: vLLM in this process, or transformers where vLLM is absent."""

from longgrpo.rollout.engine import Completion, RolloutConfig, RolloutEngine, make_engine
from longgrpo.rollout.sampling import Sampling, seed_for

__all__ = ["Completion", "RolloutConfig", "RolloutEngine", "Sampling", "make_engine", "seed_for"]
