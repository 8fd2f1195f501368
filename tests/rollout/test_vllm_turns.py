"""Episodes on vLLM: one continuous batch, the prefix cache, calls that hang."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import replace

import pytest
import torch

from longgrpo.model.packed_attention import pack_sequences, packed_hidden, use_packed_attention
from longgrpo.rollout import Sampling
from longgrpo.rollout.protocol import Turns
from longgrpo.tasks.event_loop import EventLoop, bounded
from testing.engines import VOCABULARY, running, write_model

pytest.importorskip("vllm")

BLOCK = 32  # tokens of a block of the prefix cache on a CPU
# A tenth of the tokens end a turn.
SAMPLING = Sampling(max_tokens=150, stop_token_ids=tuple(range(0, VOCABULARY, 10)))
PROMPTS = [[3 + i] * (40 + 3 * i) for i in range(12)]
SEEDS = range(len(PROMPTS))


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    write_model("llama", directory)
    with running(directory, max_model_len=256, kv_cache_gib=0.1) as (engine, _):
        yield engine


@pytest.fixture
def loop():
    loop = EventLoop()
    yield loop
    loop.close()


def replies(i, turn):
    draw = random.Random(f"{i} {turn}")
    return [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 12))]


def talk(engine, loop, wait=lambda i: 0.0, **options):
    engine.drop_caches()
    asked = []

    async def goes_on(i, completion):
        asked.append(i)
        await asyncio.sleep(wait(i))
        return replies(i, len(completion.turns))

    ended = []
    turns = Turns(goes_on, loop.submit, **{"most": 5, "tokens": 30, **options})
    completions = engine.generate(PROMPTS, SAMPLING, SEEDS, lambda i, _: ended.append((time.monotonic(), i)), turns)
    assert sorted(i for _, i in ended) == list(range(len(PROMPTS)))
    return completions, ended


@pytest.mark.parametrize("in_rounds", [False, True])
def test_tokens_are_what_was_sampled_and_given(engine, loop, in_rounds):
    completions, _ = talk(engine, loop, in_rounds=in_rounds)
    assert max(len(completion.turns) for completion in completions) == 5
    for i, completion in enumerate(completions):
        for n, (turn, after) in enumerate(zip(completion.turns, completion.turns[1:], strict=False), 1):
            assert completion.token_ids[turn.end : after.begin] == replies(i, n)
        assert len(completion.logprobs) == len(completion.sampled_ids)
        assert completion.turns[-1].end == len(completion.token_ids)


def test_the_first_turn_is_what_it_is_without_others(engine, loop):
    engine.drop_caches()
    plain = engine.generate(PROMPTS, replace(SAMPLING, max_tokens=30), SEEDS)
    completions, _ = talk(engine, loop, most=1)
    assert [(c.token_ids, c.logprobs) for c in completions] == [(c.token_ids, c.logprobs) for c in plain]


def test_rounds_are_the_same_bit_for_bit_however_slow_the_calls(engine, loop):
    first, _ = talk(engine, loop, in_rounds=True)
    draw = random.Random(3)
    again, _ = talk(engine, loop, wait=lambda i: draw.random() / 50, in_rounds=True)
    assert first == again


def test_every_whole_block_of_earlier_turns_is_reused(engine, loop):
    completions, _ = talk(engine, loop)
    later = 0
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        for before, turn in zip(completion.turns, completion.turns[1:], strict=False):
            # The last sampled token has not been read when its turn ends.
            read = len(prompt) + before.end - 1
            assert turn.cached >= read // BLOCK * BLOCK
            later += turn.cached >= BLOCK
    assert later > 10


@torch.no_grad()
def test_trainer_and_engine_agree_on_later_turns(engine, loop):
    completions, _ = talk(engine, loop)
    model = engine.model
    use_packed_attention(model)
    later = 0
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = torch.tensor(prompt + completion.token_ids)
        hidden = packed_hidden(model, pack_sequences(ids, torch.arange(len(ids)), [0, len(ids)]))
        logp = torch.log_softmax((hidden @ model.lm_head.weight.T).double(), -1)[:-1].gather(1, ids[1:, None])[:, 0]
        sampled = logp[len(prompt) - 1 :][list(completion.sampled_at)]
        assert (sampled - torch.tensor(completion.logprobs)).abs().max() < 5e-4
        later += len(completion.logprobs) - completion.turns[0].end
    assert later > 100


def test_turns_interleave_and_a_slow_call_holds_up_nobody_else(engine, loop):
    _, ended = talk(engine, loop, wait=lambda i: 2.0 if i == 0 else 0.0)
    assert ended[-1][1] == 0  # the slow one ends last, alone
    assert ended[-1][0] - ended[-2][0] > 1  # the others had long ended


def test_a_call_that_hangs_costs_its_own_timeout(engine, loop):
    async def hangs():
        await asyncio.sleep(60)

    async def goes_on(i, completion):
        if i:
            return replies(i, len(completion.turns))
        try:
            await bounded(hangs, 1.0)
        except TimeoutError:
            return None

    engine.drop_caches()
    ended = {}
    start = time.monotonic()
    turns = Turns(goes_on, loop.submit, 5, 30)
    engine.generate(PROMPTS, SAMPLING, SEEDS, lambda i, _: ended.setdefault(i, time.monotonic() - start), turns)
    assert len(ended) == len(PROMPTS)
    assert ended[0] < 40


def test_a_call_that_raises_leaves_the_engine_usable(engine, loop):
    async def goes_on(i, completion):
        if i == 3:
            raise ConnectionError("gone")
        return [5]

    with pytest.raises(ConnectionError, match="gone"):
        engine.generate(PROMPTS, SAMPLING, SEEDS, None, Turns(goes_on, loop.submit, 5, 30))
    first, _ = talk(engine, loop, in_rounds=True)
    assert len(first) == len(PROMPTS)
