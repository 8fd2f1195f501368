"""vLLM in this process, on the same weights as the trained model."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch

from longgrpo._ops import fixed
from longgrpo.config.model import LoraConfig, ModelConfig
from longgrpo.config.rollout import RolloutConfig
from longgrpo.config.sampling import NEED_TOKENIZER, Sampling
from longgrpo.model.head import base_model
from longgrpo.model.load import architecture, check_weights, end_token_ids, model_on, resolve_model, vocabulary
from longgrpo.model.lora import linear_names, outline
from longgrpo.model.shared_operators import Operators, SharedOperators, check_dtype
from longgrpo.rollout import vllm_cache, vllm_invariant, vllm_private, vllm_shared
from longgrpo.rollout.adapters import Adapter, LoraMerge, LoraSlots, Mode, choose_mode
from longgrpo.rollout.protocol import Completion, Finished, Turns, batched_tokens, check_prompts, max_length
from longgrpo.rollout.turns import Episodes

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


CALIBRATION = 256  # tokens


class VllmEngine:
    """See RolloutEngine. One a process, and torch's thread count is to be set before it is built."""

    name = "vllm"

    def __init__(self, config: RolloutConfig, model: ModelConfig, lora: LoraConfig | None = None) -> None:
        self.config = config
        self.cache_bytes = int(config.kv_cache_gib * 2**30)
        self.directory = resolve_model(model.path, model.quantization)
        self._max_length = max_length(config, self.directory)
        self._end_tokens = end_token_ids(self.directory)
        check_weights(self.directory)
        vllm = vllm_private.import_vllm(invariant=config.bitwise)
        self._architecture = architecture(self.directory)
        vllm_private.check_implementation(self._architecture)
        # With it the engine reports what it sampled from. It bounds the mask by top_k, and the CPU's runner has none.
        self._masks = config.request().top_k > 0 and not vllm_private.is_cpu()
        self._vocabulary = vocabulary(self.directory)
        self._check_sampling()
        if config.bitwise:
            self._check_bitwise(model)
        self.lora_mode: Mode = "merge"
        options = self._options(config, model)
        if lora:
            ranks = vllm_private.lora_ranks()
            mergeable = model.dtype == "float32" and model.quantization is None
            refused = model.dtype == "float32" and not vllm_private.is_cpu()
            slots = "vLLM's LoRA layers on a GPU take only model.dtype: bfloat16 or float16" if refused else ""
            self.lora_mode = choose_mode(lora, mergeable=mergeable, ranks=ranks, slots=slots, bitwise=config.bitwise)
            if self.lora_mode != "merge":
                options |= self._lora_options(min(rank for rank in ranks if rank >= lora.rank))
        try:
            with vllm_private.no_dynamo(), vllm_private.no_side_effects(), vllm_private.live_linears():
                self.llm = vllm.LLM(**options)
        except Exception as error:  # of a model's own loader, too: vLLM's KeyErrors among them
            raise ValueError(self._not_started(f"{type(error).__name__}: {error}")) from error
        if not config.bitwise:  # then they are the trainer's
            vllm_private.accurate_logprobs(self.llm)
        if config.kv_cache_dtype == "fp8":
            with vllm_private.no_dynamo():
                vllm_cache.calibrate_kv_cache(self.llm, self._some_tokens())
        views = vllm_private.weight_views(vllm_private.engine_module(self.llm), self._vocabulary)
        try:
            self.model: PreTrainedModel = model_on(views, self.directory)
        except NotImplementedError as error:
            raise NotImplementedError(f"vLLM: {error}; set rollout.engine: transformers") from error
        self._repacked = config.repack_weights and vllm_private.is_cpu()
        self._kv_bytes = vllm_cache.kv_cache_bytes(self.llm)
        self._released = False
        self._adapter: Adapter | None = None
        self._adapter_request: Any = None
        # At exit as well, for an engine that is left to the interpreter's own teardown crashes there now and then.
        self._shut_down = weakref.finalize(self, vllm_private.shut_down, self.llm)
        self.shared: SharedOperators | None = self._share_operators() if config.bitwise else None

    def _not_started(self, error: str) -> str:
        """What to say of vLLM's own error, whose words the settings of the cache are in if they are its cause."""
        config = self.config
        cache = (
            f" with rollout.max_model_len = {self._max_length}, rollout.kv_cache_gib = {config.kv_cache_gib}, "
            f"rollout.kv_cache_dtype = {config.kv_cache_dtype}"
        )
        words = ("max_model_len", "max seq len", "kv cache", "kv_cache")
        named = cache if any(word in error.lower() for word in words) else f" for {self._architecture}"
        return f"vLLM does not start{named}: {error}"

    def _check_bitwise(self, model: ModelConfig) -> None:
        """Raises NotImplementedError for what cannot share its operators, before the engine is started."""
        if vllm_private.is_cpu():
            check_dtype(getattr(torch, model.dtype))
        else:
            vllm_invariant.check_card(model.dtype)
        SharedOperators(outline(self.directory), self._max_length, self._operators)

    @property
    def _operators(self) -> Operators:
        return fixed if vllm_private.is_cpu() else vllm_invariant

    def _share_operators(self) -> SharedOperators:
        shared = SharedOperators(self.model, self._max_length, self._operators)
        vllm_shared.share_operators(self.llm, shared)
        return shared

    def _some_tokens(self) -> list[int]:
        """A prompt that is the same whenever the engine is built: a resumed run has the scales that it had."""
        generator = torch.Generator().manual_seed(0)
        count = min(CALIBRATION, self._max_length - 1)
        return torch.randint(self._vocabulary, (count,), generator=generator).tolist()

    def _check_sampling(self) -> None:
        """Raises ValueError now for what vLLM would refuse at the first rollout."""
        from vllm.exceptions import VLLMError

        try:
            self._params(self.config.request(), seed=0)
        except (VLLMError, ValueError, TypeError) as error:
            raise ValueError(f"rollout.sampling is not what vLLM takes: {error}") from error

    def _options(self, config: RolloutConfig, model: ModelConfig) -> dict[str, Any]:
        options: dict[str, Any] = dict(
            model=str(self.directory),
            dtype=model.dtype,
            load_format="safetensors",
            trust_remote_code=False,
            # Token ids go in and come out: only what looks at text needs the tokenizer.
            skip_tokenizer_init=not any(name in config.sampling for name in NEED_TOKENIZER),
            generation_config="vllm",  # a model's own sampling defaults must not leak into training
            max_model_len=self._max_length,
            kv_cache_memory_bytes=self.cache_bytes,
            kv_cache_dtype=config.kv_cache_dtype,
            max_num_seqs=config.max_num_seqs,
            logprobs_mode="processed_logprobs",  # of the distribution sampled from: temperature and truncation included
            enable_prefix_caching=True,
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )
        if model.quantization == "nf4":
            from longgrpo.rollout import nf4_vllm  # registers what it names

            options |= dict(quantization=nf4_vllm.NAME, load_format=nf4_vllm.NAME)
        if config.release_kv_cache and not vllm_private.is_cpu():
            options |= dict(enable_sleep_mode=True)
        if self._masks:
            options |= dict(return_sampling_mask=True)
        if model.dtype != "float32" and not vllm_private.is_cpu():  # on the CPU: vllm_private.wide_logits
            options |= dict(hf_overrides={"head_dtype": "float32"})  # read in vLLM 0.32.0, not yet run
        if vllm_private.is_cpu():
            # Short prompts find their prefix in blocks of 32 tokens; the default is 128.
            options |= dict(enforce_eager=True, block_size=32)
            # vLLM rewinds the generator of a request whose prompt it has read in part, which the CPU's generators
            # refuse ("CPU Generator does not use offset"): a prompt is read whole or waits for the next pass.
            options |= dict(enable_chunked_prefill=False, max_num_batched_tokens=max(2048, self._max_length))
        else:
            # What the planner counts. The cache has its size: of the utilization vLLM only checks that as much is free.
            options |= dict(max_num_batched_tokens=batched_tokens(self._max_length), gpu_memory_utilization=0.01)
            if config.bitwise:  # a compiled graph has operators of its own
                options |= dict(enforce_eager=True, attention_backend="FLASH_ATTN", block_size=vllm_invariant.PAGE)
        return options

    def _lora_options(self, rank: int) -> dict[str, Any]:
        # The embedding and the head keep none: both would cost the rollout more than all linears together.
        return dict(enable_lora=True, max_loras=1, max_lora_rank=rank, lora_target_modules=linear_names(self.directory))

    def attach(self, model: PreTrainedModel | PeftModel) -> None:
        if base_model(model) is not self.model:
            raise ValueError(
                "attach() takes engine.model, or engine.model wrapped by PEFT: other weights are not the engine's"
            )
        self._adapter, self._adapter_request = None, None
        if model is not self.model:
            self._adapter = self._enter(model)
        self.weights_changed()

    def _enter(self, model: Any) -> Adapter:
        if self.lora_mode == "merge":
            return LoraMerge(model, self.directory)
        add_slice = functools.partial(vllm_shared.add_slice, self.shared.operators) if self.shared else None
        self._adapter_request = vllm_private.activate_adapter(self.llm, add_slice)
        return LoraSlots(model, vllm_private.lora_slots(self.llm), views=self.lora_mode == "views")

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        finished: Finished | None = None,
        turns: Turns | None = None,
    ) -> list[Completion]:
        check_prompts(prompts, seeds, self.max_length())
        adapted = nullcontext() if self._repacked else self._adapted()  # the packed copy has it in already
        if turns:
            episodes = Episodes(prompts, sampling, seeds, self.max_length(), turns, finished)
            with adapted, self._kv_cache(), vllm_private.no_dynamo():
                self._run(episodes, turns)
            return episodes.completions()
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        params = [self._params(sampling, seed) for seed in seeds]
        with adapted, self._kv_cache(), vllm_private.no_dynamo():
            queued = self.llm.enqueue(requests, params, use_tqdm=False, lora_request=self._adapter_request)
            return self._completions(queued, finished)

    def _completions(self, requests: Sequence[str], finished: Finished | None) -> list[Completion]:
        """The completions of the queued requests, in order: LLM.wait_for_completion, but reporting each as it ends."""
        places = {request.partition("-")[0]: i for i, request in enumerate(requests)}  # the ids of outputs
        completions: dict[int, Completion] = {}
        while self.llm.llm_engine.has_unfinished_requests():
            for output in self.llm.llm_engine.step():
                if output.finished:
                    i, completion = places[output.request_id], _completion(output.outputs[0])
                    completions[i] = completion
                    if finished:
                        finished(i, completion)
        return [completions[i] for i in range(len(requests))]

    def _run(self, episodes: Episodes, turns: Turns) -> None:
        """One continuous batch: a turn joins it as soon as the call that it waits for is answered."""
        engine = self.llm.llm_engine
        places: dict[str, int] = {}  # of the turns that are being sampled, by the ids of outputs
        try:
            while True:
                idle = not engine.has_unfinished_requests()
                requests = episodes.ready(wait=idle, every=turns.in_rounds) if idle or not turns.in_rounds else []
                for request in requests:
                    (name,) = self.llm.enqueue(
                        [{"prompt_token_ids": request.prompt}],
                        [self._params(request.sampling, request.seed)],
                        use_tqdm=False,
                        lora_request=self._adapter_request,
                    )
                    places[name.partition("-")[0]] = request.index
                if idle and not requests:
                    return
                for output in engine.step():
                    if output.finished:
                        i, turn = places.pop(output.request_id), _completion(output.outputs[0])
                        episodes.sampled(i, turn, output.num_cached_tokens or 0)
        except BaseException:
            episodes.cancel()
            engine.abort_request(list(places))
            vllm_private.settle(self.llm)
            raise

    def _adapted(self) -> AbstractContextManager[None]:
        return self._adapter.in_engine() if self._adapter else nullcontext()

    @contextmanager
    def _kv_cache(self) -> Iterator[None]:
        """The key-value cache, for as long as a rollout lasts."""
        if self._released:
            vllm_cache.restore_kv_cache(self.llm, self._kv_bytes)
            self._released = False
        yield
        if self.config.release_kv_cache:
            vllm_cache.release_kv_cache(self.llm)
            self._released = True

    def _params(self, sampling: Sampling, seed: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        temperature, top_k = sampling.temperature, sampling.top_k
        if self._masks:  # then vLLM requires each request to sample, and from tokens that it can count
            temperature, top_k = (temperature, top_k or self._vocabulary) if temperature else (1.0, 1)
        others = dict(sampling.others)
        if isinstance(others.get("structured_outputs"), dict):
            others["structured_outputs"] = StructuredOutputsParams(**others["structured_outputs"])
        return SamplingParams(
            temperature=temperature,
            top_p=sampling.top_p,
            top_k=top_k,
            min_p=sampling.min_p,
            allowed_token_ids=None if sampling.allowed_token_ids is None else list(sampling.allowed_token_ids),
            logit_bias=dict(sampling.logit_bias) if sampling.logit_bias else None,
            max_tokens=sampling.max_tokens,
            stop_token_ids=[*(() if sampling.ignore_eos else self._end_tokens), *sampling.stop_token_ids],
            ignore_eos=sampling.ignore_eos,
            skip_special_tokens=sampling.skip_special_tokens,
            seed=seed,
            logprobs=0,  # only the sampled token's
            flat_logprobs=True,  # one list of floats per completion, and no object per token
            detokenize=any(name in others for name in NEED_TOKENIZER),
            **others,
        )

    def drop_caches(self) -> None:
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache is in use: it cannot be dropped while generate() runs")

    def weights_changed(self) -> int:
        self.drop_caches()
        copied = self._adapter.publish() if self._adapter else 0
        if self._repacked:
            with self._adapted():
                vllm_private.repack(self.llm)
        return copied

    def max_length(self) -> int:
        return self._max_length

    def close(self) -> None:
        self._adapter = None
        del self.llm, self.model
        self._shut_down()
        gc.collect()


def _completion(output: Any) -> Completion:
    finish: Literal["stop", "length"] = "length" if output.finish_reason == "length" else "stop"
    mask = output.sampling_mask
    return Completion(list(output.token_ids), list(output.logprobs.logprobs), finish, mask and mask.token_ids)
