"""How completions are sampled, and what the engine may use for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from longgrpo.config.sampling import ENGINES_OWN, Sampling, sampling_fields, sampling_of


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled, and what the engine may use for it."""

    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """auto takes vLLM if it is installed."""
    num_generations: int = 8
    """Completions per prompt. They are the group in which advantages are computed."""
    max_completion_length: int = 256
    """Longest completion, in tokens; of an episode with tools or an environment, all of it: what they answer too."""
    max_turns: int = 8
    """Turns of the model in an episode with tools or an environment."""
    turn_tokens: int | None = None
    """Longest turn of such an episode, in tokens; default: what max_completion_length leaves."""
    turns_in_rounds: bool = False
    """Begin a turn only when every episode has its answer. Turns otherwise interleave: vLLM then computes an episode
    beside others as they come, which can change the last bits of its logprobs from run to run."""
    temperature: float = 1.0
    """Logits are divided by it, in the rollout and in the loss alike."""
    sampling: Any = field(default_factory=dict)
    """Any field of vLLM's SamplingParams, as a mapping or (in Python) a SamplingParams. The seeds of the requests are
    derived from `seed`, or from train.seed if it is not set."""
    bitwise: bool = False
    """Let vLLM and the trainer share their operators, so that both give a token the same logprob, bit for bit
    (docs/bitwise.md). On a CPU, with float32 or bfloat16; importance has nothing to correct then. On a GPU, with
    bfloat16: all but the head is shared, and nothing is measured yet."""
    importance: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "token_truncate"
    """How the ratio of the trainer's to the engine's probability enters a token's loss. The loss is multiplied by the
    ratio of the token or of its sequence (the exponential of the mean log ratio over its tokens). truncate limits the
    ratio to importance_cap; mask sets it to 0 outside [1 / cap, cap]."""
    importance_cap: float = 2.0
    """Upper bound of the ratio, above 1."""
    kv_cache_gib: float = 1.0
    """The engine's key-value cache in GiB."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """Type of the cache; auto: the model's own. fp8 on a CPU needs AVX-512 or AMX."""
    release_kv_cache: bool = False
    """Release the cache's memory whenever no rollout runs."""
    sleep_level: int = 0
    """vLLM's sleep level. Above 0 is refused, because it would move or drop the weights that the trainer uses."""
    repack_weights: bool = False
    """Let vLLM keep a second copy of its linear layers in its own layout, for a faster rollout on a CPU."""
    max_num_seqs: int = 256
    """Completions that vLLM samples at a time. A GPU's memory for logits and CUDA graphs grows with it."""
    max_model_len: int | None = None
    """Tokens of prompt and completion together; default: the model's context length."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        object.__setattr__(self, "sampling", sampling_fields(self.sampling))
        temperature = self.sampling.get("temperature", self.temperature)
        if self.temperature not in (1.0, temperature):
            raise ValueError(
                f"temperature = {self.temperature} and sampling.temperature = {temperature}: leave one of them out"
            )
        object.__setattr__(self, "temperature", temperature)
        self.request()
        if self.max_turns < 1:
            raise ValueError(f"max_turns = {self.max_turns}: an episode has at least one turn")
        if self.turn_tokens is not None and not 1 <= self.turn_tokens <= self.max_completion_length:
            raise ValueError(
                f"turn_tokens = {self.turn_tokens}: a turn has at least one token, and no more than the whole episode, "
                f"max_completion_length = {self.max_completion_length}"
            )
        if not self.importance_cap > 1:
            raise ValueError(f"importance_cap = {self.importance_cap}: bounds a ratio around 1 and must be above it")
        if self.sleep_level != 0:
            raise ValueError(
                f"sleep_level = {self.sleep_level}: moves or drops the weights, which the trainer shares; "
                "release_kv_cache: true gives back the rest"
            )

    def request(self, temperature: float | None = None) -> Sampling:
        """How a completion is sampled, in training and in evaluation; `temperature`: instead of training's (0: greedy
        decoding), and no other difference."""
        return sampling_of(
            self.sampling, self.max_completion_length, self.temperature if temperature is None else temperature
        )

    def seed(self, default: int) -> int:
        """The seed from which those of the requests are derived."""
        given = self.sampling.get("seed")
        return default if given is None else given

    @property
    def not_recomputed(self) -> list[str]:
        """The sampling fields that change the engine's distribution in a way that the trainer cannot compute."""
        return [name for name in self.sampling if name in ENGINES_OWN]
