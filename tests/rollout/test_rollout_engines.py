"""What both engines promise."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longgrpo.config.model import LoraConfig, ModelConfig
from longgrpo.config.task import TaskConfig
from longgrpo.model.load import load_model
from longgrpo.model.lora import add_lora
from longgrpo.rollout import RolloutConfig, Sampling, make_engine, seed_for
from longgrpo.tasks.data import Problem
from longgrpo.tasks.evaluation import HeldOut, evaluate
from longgrpo.tasks.prompts import Prompts
from longgrpo.tasks.rewards import Reward
from testing.agreement import CONTEXT, SMOLLM2, assert_agrees, sampled_logprobs, trainer_logprobs
from testing.models import trainable_parameters

GREEDY = Sampling(temperature=0, max_tokens=8)


@pytest.fixture
def lora(engine):
    """engine.model under an adapter that is not zero, attached; gone afterwards."""
    model = add_lora(engine.model, LoraConfig(rank=8), seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    engine.attach(model)
    yield model
    assert model.unload() is engine.model
    engine.attach(engine.model)


def seeds(n, base=0):
    return [seed_for(base, 0, i, 0) for i in range(n)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_trainers(engine, prompts, temperature):
    completions = engine.generate(prompts, Sampling(temperature=temperature, max_tokens=32), seeds(8))
    assert_agrees(engine.model, prompts, completions, temperature)


def test_logprobs_are_the_trainers_under_lora(engine, lora, prompts):
    completions = engine.generate(prompts, Sampling(max_tokens=32), seeds(8))
    assert_agrees(lora, prompts, completions, 1.0)
    # The adapter is no small thing that could go missing within the tolerance.
    with lora.disable_adapter():
        base = trainer_logprobs(lora, prompts, completions)
    assert (base - sampled_logprobs(completions)).abs().mean() > 0.05


def test_the_current_adapter_is_used(engine, lora, prompts):
    before = engine.generate(prompts, GREEDY, seeds(8))
    with torch.no_grad():
        for parameter in trainable_parameters(lora):
            parameter.mul_(-1.5)
    engine.weights_changed()
    after = engine.generate(prompts, GREEDY, seeds(8))
    assert_agrees(lora, prompts, after, 1.0)
    assert before != after


def test_each_completion_is_told_of_when_it_ends(engine, prompts):
    told = []
    sampling = Sampling(max_tokens=12)
    completions = engine.generate(prompts, sampling, seeds(8), lambda i, completion: told.append((i, completion)))
    assert sorted(told, key=lambda entry: entry[0]) == list(enumerate(completions))


def test_generate_leaves_the_base_as_it_was(engine, lora, prompts):
    before = {name: p.detach().clone() for name, p in lora.named_parameters()}
    engine.generate(prompts, GREEDY, seeds(8))
    assert all(torch.equal(p, before[name]) for name, p in lora.named_parameters())


def test_greedy_completions_are_in_the_order_of_the_prompts(engine, prompts):
    together = engine.generate(prompts, GREEDY, seeds(8))
    alone = [engine.generate([prompt], GREEDY, [0])[0] for prompt in prompts]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert len({tuple(c.token_ids) for c in together}) > 1


def test_a_seed_decides_its_completion(engine, prompts):
    sampling = Sampling(max_tokens=8)
    group = engine.generate([prompts[0]] * 8, sampling, [5, 5, *seeds(6)])
    assert group[0] == group[1]
    assert len({tuple(c.token_ids) for c in group}) >= 6
    again = engine.generate([prompts[0]] * 8, sampling, [5, 5, *seeds(6)])
    assert [c.token_ids for c in group] == [c.token_ids for c in again]


def test_truncation_counts_in_the_logprobs(engine, prompts):
    completions = engine.generate(prompts, Sampling(max_tokens=4, top_k=1), seeds(8))
    assert all(logp == 0 for c in completions for logp in c.logprobs)
    nucleus = engine.generate(prompts, Sampling(max_tokens=4, top_p=0.5), seeds(8))
    assert (sampled_logprobs(nucleus) > trainer_logprobs(engine.model, prompts, nucleus)).any()


def test_a_completion_ends_with_its_end_token_or_at_its_length(engine, prompts, tokenizer):
    end = tokenizer.eos_token_id
    stopped = engine.generate(prompts, Sampling(max_tokens=32), seeds(8))
    assert {c.finish_reason for c in stopped} == {"stop", "length"}
    for completion in stopped:
        assert len(completion.logprobs) == len(completion.token_ids)
        assert end not in completion.token_ids[:-1]
        assert (completion.token_ids[-1] == end) == (completion.finish_reason == "stop")
        assert completion.finish_reason == "stop" or len(completion.token_ids) == 32
    first = engine.generate(prompts[:1], GREEDY, [0])[0].token_ids[0]
    cut = engine.generate(prompts[:1], Sampling(temperature=0, stop_token_ids=(first,)), [0])[0]
    assert (cut.token_ids, cut.finish_reason) == ([first], "stop")


def test_an_evaluation_stops_where_training_stops(engine, tokenizer):
    """Both at a token of the run's own (rollout.sampling.stop_token_ids)."""
    problems = [
        Problem(text, [{"role": "user", "content": text}], {}, i) for i, text in enumerate(["What is 1 + 1?", "Hi"])
    ]
    as_tokens = Prompts(tokenizer, TaskConfig("own"), engine.max_length(), 12)
    stops = {engine.generate([as_tokens.encode(problem)], GREEDY, [0])[0].token_ids[4] for problem in problems}
    rollout = RolloutConfig(max_completion_length=12, sampling={"stop_token_ids": sorted(stops)})
    lengths = []

    def ended(completion_ids, **_):
        lengths.extend(map(len, completion_ids))
        return [float(ids[-1] in stops) for ids in completion_ids]

    result = evaluate(engine, as_tokens, HeldOut(problems, Reward("ended", ended), 2), rollout)
    assert result.scores == [1.0, 1.0]
    assert max(lengths[:2]) <= 5


def test_the_context_ends_a_completion(engine, prompts):
    long = (prompts[0] * 50)[: CONTEXT - 3]
    short, cut = engine.generate([prompts[1], long], Sampling(temperature=0.5, max_tokens=6), [0, 0])
    assert (len(cut.token_ids), cut.finish_reason) == (3, "length")
    assert len(short.token_ids) == 6 or short.finish_reason == "stop"


def test_a_prompt_beyond_the_context_is_refused(engine, prompts):
    assert engine.max_length() == CONTEXT
    with pytest.raises(ValueError, match=r"prompt 1 has 512 tokens; the context holds 512"):
        engine.generate([prompts[0], [1] * CONTEXT], GREEDY, [0, 0])
    with pytest.raises(ValueError, match="2 prompts but 1 seeds"):
        engine.generate(prompts[:2], GREEDY, [0])
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        engine.generate([[]], GREEDY, [0])


def test_a_foreign_model_is_refused(engine):
    with pytest.raises(ValueError, match=r"engine\.model"):
        engine.attach(load_model(engine.directory))


@pytest.mark.parametrize("name", ["vllm", "transformers"])
def test_a_context_that_the_model_has_not_is_refused(name):
    with pytest.raises(ValueError, match=r"max_model_len = 100000: the model's context is 8192"):
        make_engine(RolloutConfig(engine=name, max_model_len=100_000), SMOLLM2)


def test_unknown_engines_and_models_are_named():
    with pytest.raises(FileNotFoundError, match="/no/such/model"):
        make_engine(RolloutConfig(engine="transformers"), ModelConfig("/no/such/model"))
    with pytest.raises(ValueError, match=r"'sglang'.*auto, vllm and transformers"):
        make_engine(RolloutConfig(engine="sglang"), SMOLLM2)


@given(st.integers(0, 2**62), st.integers(0, 10**6), st.integers(0, 10**4), st.integers(0, 10**3))
def test_seeds_fit_63_bits_and_differ_by_completion(base, step, prompt, completion):
    seed = seed_for(base, step, prompt, completion)
    assert 0 <= seed < 2**63
    assert seed != seed_for(base, step, prompt, completion + 1)
    assert seed != seed_for(base, step, prompt + 1, completion)


def test_seeds_are_the_same_in_every_process():
    assert seed_for(0, 1, 2, 3) == 7019356480472336628


@pytest.mark.parametrize(
    "wrong", [{"max_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": -1}, {"min_p": 2}]
)
def test_sampling_names_the_wrong_value(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} = {value}"):
        Sampling(**wrong)
