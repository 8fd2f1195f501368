"""Sampling completions with the current weights: vLLM in this process, or transformers if vLLM is absent."""

from longgrpo.config.rollout import RolloutConfig
from longgrpo.config.sampling import Sampling
from longgrpo.rollout.factory import make_engine
from longgrpo.rollout.protocol import Completion, RolloutEngine, seed_for

__all__ = ["Completion", "RolloutConfig", "RolloutEngine", "Sampling", "make_engine", "seed_for"]
