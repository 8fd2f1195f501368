"""The rollout engine: what the trainer asks of whatever samples its completions."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from longgrpo.model.load import ModelConfig, context_length
from longgrpo.model.lora import LoraConfig
from longgrpo.rollout.sampling import ENGINES_OWN, Sampling, sampling_fields, sampling_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass
class RolloutConfig:
    """How completions are sampled, and what the engine may take for it."""

    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """auto takes vLLM where it is installed."""
    num_generations: int = 8
    """Completions of a prompt: the group that an advantage is taken in."""
    max_completion_length: int = 256
    """In tokens."""
    temperature: float = 1.0
    """Logits are divided by it, in the rollout and in the loss alike."""
    sampling: Any = field(default_factory=dict)
    """Any field of vLLM's SamplingParams, as a mapping or (in Python) a SamplingParams. `seed` is what the seeds of the
    requests are made from, train.seed where it is not set."""
    importance: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "token_truncate"
    """What the ratio of trainer's to engine's probability does to a token's loss: it multiplies it, a token's own or
    its sequence's (the exponential of the mean over tokens), cut at importance_cap or, outside of [1 / cap, cap],
    taken for 0."""
    importance_cap: float = 2.0
    """Above 1."""
    kv_cache_gib: float = 1.0
    """The engine's key-value cache in GiB."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """Of the cache; auto: the model's own. fp8 on a CPU needs AVX-512 or AMX."""
    release_kv_cache: bool = False
    """Give the cache's memory back whenever no rollout runs."""
    sleep_level: int = 0
    """vLLM's. Above 0 it moves or drops the weights, which the trainer works on: refused."""
    repack_weights: bool = False
    """Let vLLM keep its linears in a layout of its own: a second copy of them, for a faster rollout on a CPU."""
    max_num_seqs: int = 256
    """Completions that vLLM works on at a time. A GPU's memory for logits and CUDA graphs grows with it."""
    max_model_len: int | None = None
    """Tokens of prompt and completion together; defaults to the model's own context."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        self.sampling = sampling_fields(self.sampling)
        temperature = self.sampling.get("temperature", self.temperature)
        if self.temperature not in (1.0, temperature):
            raise ValueError(
                f"temperature = {self.temperature} and sampling.temperature = {temperature}: leave one of them out"
            )
        self.temperature = temperature
        self.request()
        if not self.importance_cap > 1:
            raise ValueError(f"importance_cap = {self.importance_cap}: bounds a ratio around 1 and must be above it")
        if self.sleep_level != 0:
            raise ValueError(
                f"sleep_level = {self.sleep_level}: moves or drops the weights, which the trainer shares; "
                "release_kv_cache: true gives back the rest"
            )

    def request(self) -> Sampling:
        """How a training completion is sampled."""
        return sampling_of(self.sampling, self.max_completion_length, self.temperature)

    def seed(self, default: int) -> int:
        """What the seeds of the requests are made from."""
        given = self.sampling.get("seed")
        return default if given is None else given

    @property
    def not_recomputed(self) -> list[str]:
        """The sampling fields that change the engine's distribution by what the trainer does not know."""
        return [name for name in self.sampling if name in ENGINES_OWN]


@dataclass(frozen=True)
class Completion:
    """token_ids include the end token where it was sampled; logprobs holds one float a token, under the distribution
    it was sampled from (temperature and truncation included); support, for each token those that it was sampled from,
    where the engine tells."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]
    support: list[list[int]] | None = None


def batched_tokens(max_length: int) -> int:
    """Tokens of one forward of the engine on a GPU, for a context of `max_length`."""
    return min(8192, max(2048, max_length))


Finished = Callable[[int, Completion], None]


class RolloutEngine(Protocol):
    name: str
    shares_weights: bool
    model: PreTrainedModel
    """The model to train. Where shares_weights holds, its parameters are views of the engine's storage."""
    cache_bytes: int
    """Of the key-value cache that a rollout has, whatever its length; 0 where it grows with what is sampled."""

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

    def weights_changed(self) -> int:
        """To be called after every optimizer step: what the engine has cached of the old weights is dropped, and what
        it does not share is copied. Returns the bytes of that copy."""

    def drop_caches(self) -> None:
        """Forgets what is cached of earlier rollouts."""

    def max_length(self) -> int:
        """The context in tokens, prompt and completion together."""

    def close(self) -> None:
        """Gives the engine's memory back; the engine cannot be used afterwards."""


def make_engine(config: RolloutConfig, model: ModelConfig, lora: LoraConfig | None = None) -> RolloutEngine:
    """Builds the engine that `config` names; "auto" takes vLLM where it is installed, else transformers. `lora`: of the
    adapter that will be attached, for the engine that makes room for it."""
    name = config.engine
    if unknown := config.not_recomputed:
        log.warning(
            "rollout.sampling: the trainer does not know what %s does to the distribution; the ratio of trainer's to "
            "engine's probability shows it, and importance_ratio_mean how far it is from 1",
            ", ".join(unknown),
        )
    if name == "auto":
        name = "vllm" if importlib.util.find_spec("vllm") else "transformers"
        log.info("rollout engine: %s%s", name, "" if name == "vllm" else " (vllm is not installed)")
    if name == "vllm":
        from longgrpo.rollout.vllm import VllmEngine

        return VllmEngine(config, model, lora)
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
