"""Sampling fields, and the distribution that they sample from, scored by the trainer."""

import pytest
import torch

from longgrpo import linear_logprob
from longgrpo.config.sampling import ALWAYS, ENGINES_OWN, FIELDS, OWNED
from longgrpo.model.head import Head, head_of
from longgrpo.rollout import RolloutConfig, Sampling, seed_for
from longgrpo.rollout.support import processed_logits, sampled_logprob
from testing.agreement import packed, sampled_logprobs
from testing.engines import PROMPTS, running, write_model

RESHAPED = [
    {"min_p": 0.1, "temperature": 1.5},
    {"top_p": 0.8, "temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.9, "top_k": 20, "min_p": 0.02, "temperature": 1.3},
    {"allowed_token_ids": list(range(5, 400, 3)), "top_p": 0.9},
    {"logit_bias": {7: 4.0, 11: -3.5}, "min_p": 0.05},
]
IDS = ["min_p", "top_p", "top_k", "all three", "allowed tokens", "bias"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """An engine whose distributions are neither flat nor a single peak."""
    pytest.importorskip("vllm")
    directory = tmp_path_factory.mktemp("llama")
    write_model("llama", directory)
    with running(directory) as (engine, model):
        with torch.no_grad():
            model.lm_head.weight.mul_(0.3)
        engine.weights_changed()
        yield engine


def trainer_logprob(engine, completions, sampling):
    hidden, target = packed(engine.model, PROMPTS * 8, completions)
    return sampled_logprob(hidden, head_of(engine.model), target, sampling)


def ask(engine, sampling):
    return engine.generate(PROMPTS * 8, sampling, range(8 * len(PROMPTS)))


@pytest.mark.parametrize("fields", RESHAPED, ids=IDS)
def test_the_ratio_is_of_one_support(tiny, fields):
    sampling = RolloutConfig(sampling={**fields, "ignore_eos": True}, max_completion_length=24).request()
    assert sampling.reshapes
    completions = ask(tiny, sampling)
    with torch.no_grad():
        logp = trainer_logprob(tiny, completions, sampling).logp
    difference = logp - sampled_logprobs(completions)
    assert difference.abs().mean() <= 1e-5
    # On the very edge of the support rounding decides, once in hundreds of tokens here: a flat distribution of 1,000.
    assert (difference.abs() > 5e-4).float().mean() <= 1 / 300
    assert difference.abs().max() <= 5e-3
    assert abs(difference.exp().mean() - 1) <= 1e-3
    # Scored without its support, the ratio is far from 1.
    plain = Sampling(temperature=sampling.temperature)
    with torch.no_grad():
        biased = trainer_logprob(tiny, completions, plain).logp - sampled_logprobs(completions)
    assert abs(biased.exp().mean() - 1) > 1e-2


@pytest.mark.parametrize("fields", RESHAPED[:4], ids=IDS[:4])
def test_the_support_is_that_of_transformers(fields):
    """An independent oracle; vLLM's order is min_p, top_k, top_p."""
    from transformers import LogitsProcessorList
    from transformers.generation import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = torch.randn(64, 500, generator=torch.Generator().manual_seed(0)) * 3
    kinds = {"temperature": TemperatureLogitsWarper, "min_p": MinPLogitsWarper, "top_k": TopKLogitsWarper}
    kinds["top_p"] = TopPLogitsWarper
    warpers = LogitsProcessorList([kind(fields[name]) for name, kind in kinds.items() if name in fields])
    expected = warpers(None, logits)
    sampling = RolloutConfig(sampling=fields).request()
    assert torch.equal(processed_logits(logits, sampling), expected)
    assert (expected == -torch.inf).any()


def test_the_sampled_token_is_never_left_out():
    weight = torch.tensor([[3.0], [2.0], [0.0], [1.0]])  # the logits of hidden 1
    logp = sampled_logprob(torch.ones(2, 1), Head(weight), torch.tensor([0, 2]), Sampling(top_k=1)).logp
    torch.testing.assert_close(logp, torch.tensor([0.0, 0.0 - torch.tensor([3.0, 0.0]).logsumexp(0)]))


def test_the_engines_own_support_is_taken_where_it_tells():
    """Whatever the trainer's rounding would say, and in the gradient too."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator).requires_grad_() for n in (3, 40))
    target, support = torch.tensor([4, 9, 1]), [[4, 5], [9], [0, 1, 39]]
    logp = sampled_logprob(hidden, Head(weight), target, Sampling(top_k=2, temperature=0.5), support).logp
    logits = hidden @ weight.T / 0.5
    expected = torch.stack(
        [logits[i, t] - logits[i, s].logsumexp(0) for i, (t, s) in enumerate(zip(target, support, strict=True))]
    )
    torch.testing.assert_close(logp, expected)
    weights = torch.arange(1.0, 4.0)
    got = torch.autograd.grad((logp * weights).sum(), (hidden, weight))
    torch.testing.assert_close(got, torch.autograd.grad((expected * weights).sum(), (hidden, weight)))


def test_logprobs_entropy_and_gradients():
    """Without a support those of the loss's own op; with one those of the tokens left, renormalized."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator).requires_grad_() for n in (6, 40))
    target = torch.randint(40, (6,), generator=generator)

    def gradients(logp, entropy):
        return torch.autograd.grad((logp * torch.arange(6)).sum() + entropy.sum(), (hidden, weight))

    expected = linear_logprob(hidden, weight, target, temperature=0.7, entropy=True)
    got = sampled_logprob(hidden, Head(weight), target, Sampling(temperature=0.7))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradients(*got), gradients(*expected))

    logits = hidden @ weight.T
    left = (
        torch.zeros(6, 40, dtype=torch.bool).scatter(1, logits.topk(5).indices, True).scatter(1, target[:, None], True)
    )
    p = torch.where(left, logits.exp(), 0) / torch.where(left, logits.exp(), 0).sum(1, keepdim=True)
    logp, entropy = p.gather(1, target[:, None])[:, 0].log(), -(p * (p + ~left).log()).sum(1)
    got = sampled_logprob(hidden, Head(weight), target, Sampling(top_k=5))
    torch.testing.assert_close(got.logp, logp)
    torch.testing.assert_close(got.entropy, entropy)
    torch.testing.assert_close(gradients(*got), gradients(logp, entropy))


def test_chunks_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(7, 16, generator=generator), torch.randn(40, 16, generator=generator)
    target = torch.arange(7)
    whole = sampled_logprob(hidden, Head(weight), target, Sampling(top_p=0.7))
    monkeypatch.setattr("longgrpo.rollout.support.CHUNK", 3 * 40 * 4)
    torch.testing.assert_close(sampled_logprob(hidden, Head(weight), target, Sampling(top_p=0.7)), whole)


def test_every_field_of_vllm_is_known():
    params = pytest.importorskip("vllm").SamplingParams
    internal = {"output_text_buffer_length"} | {name for name in params.__struct_fields__ if name.startswith("_")}
    assert {*FIELDS, *OWNED} == set(params.__struct_fields__) - internal
    assert not set(FIELDS) & set(OWNED)


GIVEN = {
    "top_p": 0.9, "top_k": 7, "min_p": 0.1, "presence_penalty": 0.5, "frequency_penalty": 0.25,
    "repetition_penalty": 1.1, "min_tokens": 3, "stop": ["END"], "stop_token_ids": [5], "ignore_eos": True,
    "skip_special_tokens": False, "bad_words": ["no"], "logit_bias": {3: 1.0}, "allowed_token_ids": [3, 4, 5],
    "thinking_token_budget": 9, "extra_args": {"a": 1}, "watermarking": False,
}  # fmt: skip


def test_every_field_reaches_the_engine(tiny):
    given = {**GIVEN, "structured_outputs": {"regex": "[0-9]+"}, "repetition_detection": None}
    assert set(given) == set(FIELDS) - {"seed", "temperature", *ALWAYS}
    config = RolloutConfig(sampling={**given, "temperature": 0.7, "seed": 3407}, max_completion_length=9)
    params = tiny._params(config.request(), seed=11)
    for name, value in GIVEN.items():
        assert getattr(params, name) == value, name
    assert params.structured_outputs.regex == "[0-9]+"
    assert (params.temperature, params.max_tokens, params.seed, params.logprobs, params.n) == (0.7, 9, 11, 0, 1)
    assert config.seed(default=0) == 3407 != RolloutConfig().seed(default=0)
    assert set(config.not_recomputed) == set(ENGINES_OWN)


def test_a_sampling_params_object_is_as_good_as_a_mapping():
    params = pytest.importorskip("vllm").SamplingParams
    fields = {"min_p": 0.1, "top_p": 1.0, "top_k": -1, "seed": 3407, "stop": ["</s>"]}
    given = params(**fields, include_stop_str_in_output=True)
    expected = {"min_p": 0.1, "top_k": -1, "seed": 3407, "stop": ["</s>"], "include_stop_str_in_output": True}
    config = RolloutConfig(sampling=given)
    assert config.sampling == expected
    assert config.request() == RolloutConfig(sampling=expected).request()
    with pytest.raises(ValueError, match=r"rollout\.sampling\.max_tokens is the trainer's.*max_completion_length"):
        RolloutConfig(sampling=params(max_tokens=99))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sampling": {"min_pp": 0.1}}, r"rollout\.sampling\.min_pp; did you mean 'min_p'"),
        ({"sampling": {"zzz": 0.1}}, r"rollout\.sampling\.zzz; vLLM's are temperature, top_p, .*extra_args"),
        ({"sampling": {"n": 4}}, r"rollout\.sampling\.n is the trainer's: set rollout\.num_generations"),
        ({"sampling": {"logprobs": 4}}, r"logprobs is the trainer's: it asks for what it trains on"),
        ({"sampling": {"temperature": 0.5}, "temperature": 0.7}, r"0\.7 and sampling\.temperature = 0\.5: leave one"),
        ({"sampling": {"min_p": 3}}, "min_p = 3"),
        ({"sampling": 7}, "sampling = 7: give a mapping"),
        ({"sampling": {"include_stop_str_in_output": False}}, "output = False: a reply is the text of all its tokens"),
        ({"sampling": {"spaces_between_special_tokens": True}}, "tokens = True: a reply is the text of all its tokens"),
        ({"sleep_level": 1}, "sleep_level = 1: moves or drops the weights, which the trainer shares"),
        ({"sleep_level": 2}, "sleep_level = 2: moves or drops"),
        ({"importance_cap": 1.0}, "importance_cap = 1.0"),
    ],
)
def test_what_cannot_be_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        RolloutConfig(**given)


def test_fields_of_another_engine_and_values_that_vllm_refuses(tmp_path):
    from longgrpo.config.model import ModelConfig
    from longgrpo.rollout import make_engine

    write_model("llama", tmp_path)
    model = ModelConfig(str(tmp_path))
    with pytest.raises(ValueError, match=r"rollout\.sampling: stop needs rollout\.engine: vllm"):
        make_engine(RolloutConfig(engine="transformers", sampling={"stop": ["END"]}), model)
    with pytest.raises(ValueError, match=r"kv_cache_dtype .* need rollout\.engine: vllm"):
        make_engine(RolloutConfig(engine="transformers", kv_cache_dtype="fp8"), model)
    pytest.importorskip("vllm")
    with pytest.raises(ValueError, match=r"not what vLLM takes: .*min_tokens must be less than or equal to"):
        make_engine(RolloutConfig(engine="vllm", sampling={"min_tokens": 300}), model)


def test_seeds_depend_on_the_given_one():
    assert seed_for(3407, 1, 0, 0) != seed_for(0, 1, 0, 0)
