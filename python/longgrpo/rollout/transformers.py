"""transformers' own generate, on the trained model itself: slower than vLLM, and wherever torch runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longgrpo.config.model import ModelConfig
from longgrpo.config.rollout import RolloutConfig
from longgrpo.config.sampling import Sampling
from longgrpo.model.head import base_model
from longgrpo.model.load import end_token_ids, load_model, resolve_model
from longgrpo.model.shared_operators import SharedOperators
from longgrpo.rollout.protocol import Completion, Finished, Turns, check_prompts, max_length
from longgrpo.rollout.support import processed_logits
from longgrpo.rollout.turns import Episodes

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

BATCH = 64  # prompts that share a forward: bounds the key-value cache


class TransformersEngine:
    """See RolloutEngine. The model that is sampled from and the one that is trained are one object."""

    name = "transformers"
    cache_bytes = 0
    shared: SharedOperators | None = None

    def __init__(self, config: RolloutConfig, model: ModelConfig) -> None:
        self.directory = resolve_model(model.path, model.quantization)
        if others := config.request().others:
            raise ValueError(f"rollout.sampling: {', '.join(others)} needs rollout.engine: vllm")
        if config.kv_cache_dtype != "auto" or config.repack_weights:
            raise ValueError("rollout.kv_cache_dtype and rollout.repack_weights need rollout.engine: vllm")
        if config.bitwise:
            raise ValueError("rollout.bitwise needs rollout.engine: vllm")
        self._max_length = max_length(config, self.directory)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = load_model(self.directory, model.dtype, device, model.quantization)
        self._attached: Any = self.model
        self._end_tokens = end_token_ids(self.directory)

    def attach(self, model: PreTrainedModel | PeftModel) -> None:
        if base_model(model) is not self.model:
            raise ValueError(
                "attach() takes engine.model, or engine.model wrapped by PEFT: other weights are not the engine's"
            )
        self._attached = model

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        finished: Finished | None = None,
        turns: Turns | None = None,
    ) -> list[Completion]:
        check_prompts(prompts, seeds, self._max_length)
        completions: list[Completion] = []
        with _generating(self._attached), torch.no_grad():
            if turns:
                return self._run(Episodes(prompts, sampling, seeds, self._max_length, turns, finished))
            for i in range(0, len(prompts), BATCH):
                limits = [min(sampling.max_tokens, self._max_length - len(prompt)) for prompt in prompts[i : i + BATCH]]
                batch = self._batch(prompts[i : i + BATCH], sampling, seeds[i : i + BATCH], limits)
                if finished:
                    for j, completion in enumerate(batch, i):
                        finished(j, completion)
                completions += batch
        return completions

    def _run(self, episodes: Episodes) -> list[Completion]:
        """Turn after turn of all episodes, for generate() takes nothing in while it runs."""
        try:
            while requests := episodes.ready(wait=True, every=True):
                for i in range(0, len(requests), BATCH):
                    some = requests[i : i + BATCH]
                    turns = self._batch(
                        [request.prompt for request in some],
                        some[0].sampling,
                        [request.seed for request in some],
                        [request.sampling.max_tokens for request in some],
                    )
                    for request, turn in zip(some, turns, strict=True):
                        episodes.sampled(request.index, turn)
        except BaseException:
            episodes.cancel()
            raise
        return episodes.completions()

    def _batch(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int], limits: Sequence[int]
    ) -> list[Completion]:
        """limits: tokens that each may have; sampling.max_tokens is not looked at."""
        from transformers import GenerationConfig, LogitsProcessorList

        ends = {*(() if sampling.ignore_eos else self._end_tokens), *sampling.stop_token_ids}
        sampler = _Sampler(sampling, seeds)
        input_ids, attention_mask = _pad_left(prompts, self.model.device)
        config = GenerationConfig(
            max_new_tokens=max(limits), do_sample=False, eos_token_id=sorted(ends) or None, pad_token_id=0
        )
        tokens = self._attached.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([sampler]),
        )[:, input_ids.shape[1] :]  # [B, steps]
        logprobs = torch.stack(sampler.logprobs, 1)  # [B, steps]
        return [
            _completion(row[:limit], row_logprobs[:limit], ends)
            for row, row_logprobs, limit in zip(tokens.tolist(), logprobs.tolist(), limits, strict=True)
        ]

    def weights_changed(self) -> int:
        """Nothing is cached between two calls of generate(), and nothing copied."""
        return 0

    def drop_caches(self) -> None:
        pass

    def max_length(self) -> int:
        return self._max_length

    def close(self) -> None:
        del self.model, self._attached


class _Sampler:
    """A logits processor that draws the token itself, each row from a generator of its own, and leaves generate()'s
    greedy choice no other. So a completion depends only on its own seed, and its logprob is known."""

    def __init__(self, sampling: Sampling, seeds: Sequence[int]) -> None:
        self.sampling = sampling
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.logprobs: list[Tensor] = []  # a [B] for each step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = processed_logits(scores.float(), self.sampling)  # [B, V]
        logp = scores - scores.logsumexp(-1, keepdim=True)  # log_softmax is 1e-5 too high at 49,152 tokens
        token = scores.argmax(-1, keepdim=True) if self.sampling.temperature == 0 else self._draw(logp)  # [B, 1]
        self.logprobs.append(logp.gather(1, token)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0)

    def _draw(self, logp: Tensor) -> Tensor:
        cdf = logp.double().exp().cumsum(-1)  # [B, V]
        uniform = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in self.generators]).to(cdf.device)
        # right: the first token whose cdf exceeds the draw, which one of probability 0 never is.
        return torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)


@contextmanager
def _generating(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Generation's attention (padding, a cache), eval mode, and none of the sampling defaults that a model brings along
    (generate() would take them for whatever is not set); the trainer's own are put back."""
    from transformers import GenerationConfig

    base = base_model(model)
    attention, training, defaults = base.config._attn_implementation, model.training, base.generation_config
    base.set_attn_implementation("sdpa")
    base.generation_config = GenerationConfig()
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        base.generation_config = defaults
        base.set_attn_implementation(attention)


def _pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, [B, T] int64 each."""
    width = max(len(prompt) for prompt in prompts)
    rows = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(rows, device=device), torch.tensor(mask, device=device)


def _completion(tokens: list[int], logprobs: list[float], ends: set[int]) -> Completion:
    stop = next((i for i, token in enumerate(tokens) if token in ends), None)
    if stop is None:
        return Completion(tokens, logprobs, "length")
    return Completion(tokens[: stop + 1], logprobs[: stop + 1], "stop")
