"""vLLM in this process, on the same weights as the trained model."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from longgrpo.model.load import ModelConfig, base_model, end_token_ids, resolve_model
from longgrpo.rollout import vllm_private
from longgrpo.rollout.engine import Completion, Finished, RolloutConfig, check_prompts, max_length
from longgrpo.rollout.sampling import Sampling
from longgrpo.rollout.shared_weights import LoraMerge, model_on

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class VllmEngine:
    """See RolloutEngine. One a process, and torch's thread count is to be set before it is built.

    An attached PEFT model has its adapter merged into the shared base while generate() runs, and at no other time.
    """

    name = "vllm"
    shares_weights = True

    def __init__(self, config: RolloutConfig, model: ModelConfig) -> None:
        self.directory = resolve_model(model.path)
        self._max_length = max_length(config, self.directory)
        vllm = vllm_private.import_vllm()
        try:
            with vllm_private.no_dynamo(), vllm_private.no_side_effects(), vllm_private.live_linears():
                self.llm = vllm.LLM(**self._options(config, model))
        except ValueError as error:
            raise ValueError(
                f"vLLM does not start with rollout.max_model_len = {self._max_length}, "
                f"rollout.kv_cache_gib = {config.kv_cache_gib}: {error}"
            ) from error
        vllm_private.accurate_logprobs(self.llm)
        self._end_tokens = end_token_ids(self.directory)
        hf_config = self.llm.llm_engine.model_config.hf_text_config
        views = vllm_private.weight_views(vllm_private.engine_module(self.llm), hf_config.vocab_size)
        self.model: PreTrainedModel = model_on(views, self.directory)
        self._merge: LoraMerge | None = None
        # At exit as well, for an engine that is left to the interpreter's own teardown crashes there now and then.
        self._shut_down = weakref.finalize(self, vllm_private.shut_down, self.llm)

    def _options(self, config: RolloutConfig, model: ModelConfig) -> dict[str, Any]:
        options: dict[str, Any] = dict(
            model=str(self.directory),
            dtype=model.dtype,
            load_format="safetensors",
            skip_tokenizer_init=True,  # token ids go in and come out
            generation_config="vllm",  # a model's own sampling defaults must not leak into training
            max_model_len=self._max_length,
            kv_cache_memory_bytes=int(config.kv_cache_gib * 2**30),
            logprobs_mode="processed_logprobs",  # of the distribution sampled from: temperature and truncation included
            enable_prefix_caching=True,
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )
        if vllm_private.is_cpu():
            # Short prompts find their prefix in blocks of 32 tokens; the default is 128.
            options |= dict(enforce_eager=True, block_size=32)
            # vLLM rewinds the generator of a request whose prompt it has read in part, which the CPU's generators
            # refuse ("CPU Generator does not use offset"): a prompt is read whole or waits for the next pass.
            options |= dict(enable_chunked_prefill=False, max_num_batched_tokens=max(2048, self._max_length))
        return options

    def attach(self, model: PreTrainedModel | PeftModel) -> None:
        if base_model(model) is not self.model:
            raise ValueError(
                "attach() takes engine.model, or engine.model wrapped by PEFT: other weights are not the engine's"
            )
        self._merge = LoraMerge(model, self.directory) if model is not self.model else None
        self.weights_changed()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        finished: Finished | None = None,
    ) -> list[Completion]:
        check_prompts(prompts, seeds, self.max_length())
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        params = [self._params(sampling, seed) for seed in seeds]
        merged: AbstractContextManager[None] = self._merge.merged() if self._merge else nullcontext()
        with merged, vllm_private.no_dynamo():
            return self._completions(self.llm.enqueue(requests, params, use_tqdm=False), finished)

    def _completions(self, requests: Sequence[str], finished: Finished | None) -> list[Completion]:
        """Of the requests in the queue, in their order: LLM.wait_for_completion, which tells of each as it ends."""
        places = {request.partition("-")[0]: i for i, request in enumerate(requests)}  # what outputs are called by
        completions: dict[int, Completion] = {}
        while self.llm.llm_engine.has_unfinished_requests():
            for output in self.llm.llm_engine.step():
                if output.finished:
                    i, completion = places[output.request_id], _completion(output.outputs[0])
                    completions[i] = completion
                    if finished:
                        finished(i, completion)
        return [completions[i] for i in range(len(requests))]

    def _params(self, sampling: Sampling, seed: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            max_tokens=sampling.max_tokens,
            stop_token_ids=[*self._end_tokens, *sampling.stop_token_ids],
            seed=seed,
            logprobs=0,  # the sampled token's alone
            detokenize=False,
        )

    def weights_changed(self) -> None:
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache is in use: weights_changed() must not be called while generate() runs")

    def max_length(self) -> int:
        return self._max_length

    def close(self) -> None:
        self._merge = None
        del self.llm, self.model
        self._shut_down()
        gc.collect()


def _completion(output: Any) -> Completion:
    token_ids = list(output.token_ids)
    logprobs = [step[token].logprob for step, token in zip(output.logprobs, token_ids, strict=True)]
    return Completion(token_ids, logprobs, output.finish_reason)
