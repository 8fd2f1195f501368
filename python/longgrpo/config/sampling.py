"""How a completion is sampled: the fields of vLLM's SamplingParams, and who sets each of them."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# The fields that the trainer sets itself in every request, and why or from what.
_THE_TRAINERS = "it asks for what it trains on, the logprobs of the sampled tokens"
OWNED = {
    "n": "set rollout.num_generations",
    "max_tokens": "set rollout.max_completion_length",
    "detokenize": "stop, bad_words and structured_outputs switch it on",
    "output_kind": "it waits for whole completions",
    "stream_interval": "it waits for whole completions",
    "skip_clone": "each request has a seed of its own",
    "skip_reading_prefix_cache": "completions of one prompt share its cache",
    "trace_decode_token_ids": "completions are sampled",
    "routed_experts_prompt_start": "expert routing is not replayed",
    "logprobs": _THE_TRAINERS,
    "flat_logprobs": _THE_TRAINERS,
    "prompt_logprobs": _THE_TRAINERS,
    "prompt_logprob_token_ids": _THE_TRAINERS,
    "prompt_logprob_start": _THE_TRAINERS,
    "logprob_token_ids": _THE_TRAINERS,
}
# They change the distribution in a way that the trainer takes into account (longgrpo.rollout.support).
RECOMPUTED = ("temperature", "top_p", "top_k", "min_p", "allowed_token_ids", "logit_bias")
# They change it in a way that only the engine knows.
ENGINES_OWN = (
    "presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens", "bad_words", "structured_outputs",
    "thinking_token_budget", "watermarking", "extra_args",
)  # fmt: skip
# They end a completion, or say how it is written out.
ENDINGS = (
    "seed", "stop", "stop_token_ids", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens",
    "spaces_between_special_tokens", "repetition_detection",
)  # fmt: skip
# A reply is decoded from its tokens by the tokenizer, so that only one value of each of these holds.
ALWAYS = {"include_stop_str_in_output": True, "spaces_between_special_tokens": False}
FIELDS = (*RECOMPUTED, *ENDINGS, *ENGINES_OWN)
NEED_TOKENIZER = ("stop", "bad_words", "structured_outputs")


@dataclass(frozen=True)
class Sampling:
    """One request's sampling parameters.

    temperature 0 is greedy decoding; its logprobs are those of temperature 1. top_k 0, top_p 1 and min_p 0 are off.
    The end tokens are the model's own (generation_config.json), to which stop_token_ids adds; ignore_eos leaves them
    out. With skip_special_tokens false, the text of a reply has them too, its end token among them. `others` are
    further fields of vLLM's SamplingParams.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    allowed_token_ids: tuple[int, ...] | None = None
    logit_bias: Mapping[int, float] | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    others: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens = {self.max_tokens}: a completion has at least one token")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature = {self.temperature}: must be 0 (greedy) or above")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}: must lie in (0, 1]; 1 is off")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k}: must be 0 (off) or above")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p = {self.min_p}: must lie in [0, 1]; 0 is off")

    @property
    def reshapes(self) -> bool:
        """Whether it samples from another distribution than the model's at its temperature."""
        truncated = self.temperature > 0 and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)
        return truncated or self.allowed_token_ids is not None or bool(self.logit_bias)


def sampling_fields(given: Any) -> dict[str, Any]:
    """The fields that `given` sets, a mapping or vLLM's own SamplingParams, as plain values.

    Raises ValueError for one that vLLM does not have (naming the nearest), and for one that the trainer owns.
    """
    fields = _set_fields(given)
    for name, value in fields.items():
        if name in ALWAYS and value != ALWAYS[name]:
            raise ValueError(
                f"rollout.sampling.{name} = {value}: a reply is the text of all its tokens, which is {ALWAYS[name]}; "
                "leave it out, and let the reward function cut what it does not want"
            )
        if name in OWNED:
            raise ValueError(f"rollout.sampling.{name} is the trainer's: {OWNED[name]}")
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"vLLM's are {', '.join(FIELDS)}"
            raise ValueError(f"unknown field rollout.sampling.{name}; {remedy}")
    return fields


def sampling_of(fields: Mapping[str, Any], max_tokens: int, temperature: float) -> Sampling:
    """The request of `fields` as sampling_fields returns them; its seed is not part of it."""
    rest = {name: value for name, value in fields.items() if name not in ("seed", "temperature", *ALWAYS)}
    rest["top_k"] = max(rest.get("top_k", 0), 0)  # -1 is another way to say off
    for name in ("allowed_token_ids", "stop_token_ids"):
        if rest.get(name) is not None:
            rest[name] = tuple(rest[name])
    if rest.get("logit_bias"):
        rest["logit_bias"] = {int(token): float(bias) for token, bias in rest["logit_bias"].items()}
    known = {f.name for f in dataclasses.fields(Sampling)}
    others = {name: rest.pop(name) for name in list(rest) if name not in known}
    return Sampling(max_tokens=max_tokens, temperature=temperature, **rest, others=others)


def _set_fields(given: Any) -> dict[str, Any]:
    if isinstance(given, Mapping):
        return dict(given)
    if type(given).__name__ != "SamplingParams":
        raise ValueError(f"rollout.sampling = {given!r}: give a mapping of vLLM's sampling fields, or a SamplingParams")
    untouched = type(given)()
    public = [name for name in (*FIELDS, *OWNED) if getattr(given, name) != getattr(untouched, name)]
    return {name: _plain(getattr(given, name)) for name in public}


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
