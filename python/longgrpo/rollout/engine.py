"""The rollout engine: what the trainer asks of whatever samples its completions."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from longgrpo.model.load import ModelConfig, context_length
from longgrpo.rollout.sampling import Sampling

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass
class RolloutConfig:
    """How completions are sampled. kv_cache_gib is the engine's key-value cache in GiB; max_model_len (tokens of prompt
    and completion together) defaults to the model's own context."""

    engine: Literal["auto", "vllm", "transformers"] = "auto"
    num_generations: int = 8
    max_completion_length: int = 256
    temperature: float = 1.0
    kv_cache_gib: float = 1.0
    max_model_len: int | None = None

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}


@dataclass(frozen=True)
class Completion:
    """token_ids include the end token where it was sampled; logprobs holds one float a token, under the distribution
    it was sampled from (temperature and truncation included)."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]


Finished = Callable[[int, Completion], None]


class RolloutEngine(Protocol):
    name: str
    shares_weights: bool
    model: PreTrainedModel
    """The model to train. Where shares_weights holds, its parameters are views of the engine's storage."""

    def attach(self, model: PreTrainedModel | PeftModel) -> None:
        """From now on generate() samples from `model`: engine.model itself, or engine.model wrapped by PEFT."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        finished: Finished | None = None,
    ) -> list[Completion]:
        """One completion an entry of `prompts`, in order, entry i sampled with seeds[i]. A prompt that leaves no room
        for a token within max_length() raises ValueError; a completion ends with "length" where the context ends.
        finished(i, completion) is called as soon as entry i is complete, once for each."""

    def weights_changed(self) -> None:
        """To be called after every optimiser step: what the engine has cached of the old weights is dropped."""

    def max_length(self) -> int:
        """The context in tokens, prompt and completion together."""

    def close(self) -> None:
        """Gives the engine's memory back; the engine cannot be used afterwards."""


def make_engine(config: RolloutConfig, model: ModelConfig) -> RolloutEngine:
    """Builds the engine that `config` names; "auto" takes vLLM where it is installed, else transformers."""
    name = config.engine
    if name == "auto":
        name = "vllm" if importlib.util.find_spec("vllm") else "transformers"
        log.info("rollout engine: %s%s", name, "" if name == "vllm" else " (vllm is not installed)")
    if name == "vllm":
        from longgrpo.rollout.vllm import VllmEngine

        return VllmEngine(config, model)
    if name == "transformers":
        from longgrpo.rollout.transformers import TransformersEngine

        return TransformersEngine(config, model)
    raise ValueError(f"rollout.engine = {name!r}: known engines are auto, vllm and transformers")


def max_length(config: RolloutConfig, directory: Path) -> int:
    """The context to run with, in tokens; raises ValueError where `config` asks for more than the model has."""
    context = context_length(directory)
    if config.max_model_len is not None and not 2 <= config.max_model_len <= context:
        raise ValueError(
            f"rollout.max_model_len = {config.max_model_len}: the model's context is {context} tokens, "
            "and a prompt and its completion need two"
        )
    return config.max_model_len or context


def check_prompts(prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_length: int) -> None:
    """Raises ValueError for what no engine can sample from, before any work is done."""
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds: each request has its own")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty")
        if len(prompt) >= max_length:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens; the context holds {max_length}, prompt and completion together: "
                "shorten the prompt or raise rollout.max_model_len"
            )
