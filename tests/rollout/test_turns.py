"""Episodes: an engine that samples by a rule, and conversations drawn at random."""

import asyncio
import random
import threading
from concurrent.futures import Future

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longgrpo.rollout import Completion, Sampling, seed_for
from longgrpo.rollout.protocol import Turns
from longgrpo.rollout.turns import Episodes, turn_seed
from longgrpo.tasks.event_loop import EventLoop, bounded

CONTEXT = 60


def at_once(work) -> Future:
    """A coroutine's result, on no other thread: answers come in the order of the questions."""
    future: Future = Future()
    try:
        future.set_result(asyncio.run(work))
    except Exception as error:
        future.set_exception(error)
    return future


def run(episodes, sample, order=lambda requests: requests, every=False):
    """An engine: takes what is ready, and finishes it one turn after the other."""
    asked, waiting = [], []
    while True:
        waiting += (requests := episodes.ready(wait=not waiting, every=every))
        asked += requests
        if not waiting:
            return episodes.completions(), asked
        waiting = order(waiting)
        request = waiting.pop()
        episodes.sampled(request.index, sample(request), cached=len(request.prompt) // 4)


class Conversation:
    """Draws turns and replies, and writes down what was sampled and given."""

    def __init__(self, seed, most_turns, budget, turn_tokens):
        self.random = random.Random(seed)
        self.turns = Turns(self.goes_on, at_once, most_turns, turn_tokens)
        self.sampling = Sampling(max_tokens=budget)
        self.sampled: dict[int, list] = {}  # (token, logprob, support) of each turn
        self.given: dict[int, list] = {}
        self.over: dict[int, bool] = {}

    def sample(self, request):
        length = self.random.randint(1, request.sampling.max_tokens)
        stops = self.random.random() < 0.8
        length = length if stops else request.sampling.max_tokens
        tokens = [self.random.randrange(1000) for _ in range(length)]
        logprobs = [-self.random.random() for _ in tokens]
        support = [[token, token + 1] for token in tokens]
        self.sampled.setdefault(request.index, []).append((tokens, logprobs, support))
        return Completion(tokens, logprobs, "stop" if stops else "length", support)

    async def goes_on(self, i, completion):
        assert completion.turns[-1].end == len(completion.token_ids)
        if self.random.random() < 0.3:
            self.over[i] = True
            return None
        given = [self.random.randrange(1000, 2000) for _ in range(self.random.randint(0, 6))]
        self.given.setdefault(i, []).append(given)
        return given


@given(
    seed=st.integers(0, 10**9),
    lengths=st.lists(st.integers(1, CONTEXT - 1), min_size=1, max_size=5),
    most_turns=st.integers(1, 5),
    budget=st.integers(1, 40),
    turn_tokens=st.none() | st.integers(1, 12),
    every=st.booleans(),
)
def test_ids_are_what_was_sampled_and_given_and_nothing_else(seed, lengths, most_turns, budget, turn_tokens, every):
    talk = Conversation(seed, most_turns, budget, turn_tokens)
    prompts = [[7 + i] * length for i, length in enumerate(lengths)]
    finished = {}
    episodes = Episodes(prompts, talk.sampling, range(len(prompts)), CONTEXT, talk.turns, finished.__setitem__)
    shuffle = random.Random(seed + 1).sample
    completions, asked = run(episodes, talk.sample, lambda waiting: shuffle(waiting, len(waiting)), every)
    assert finished == dict(enumerate(completions))
    for i, completion in enumerate(completions):
        sampled, given = talk.sampled[i], talk.given.get(i, [])
        # Of n turns all but the last were followed by what was given.
        pieces = [piece for turn, gift in zip(sampled, [*given, []], strict=False) for piece in (turn[0], gift)]
        ids = [token for piece in pieces[: 2 * len(sampled) - 1] for token in piece]
        assert completion.token_ids == ids
        assert completion.sampled_ids == [token for turn in sampled for token in turn[0]]
        assert completion.logprobs == [logp for turn in sampled for logp in turn[1]]
        assert completion.support == [tokens for turn in sampled for tokens in turn[2]]
        assert [completion.token_ids[turn.begin : turn.end] for turn in completion.turns] == [t[0] for t in sampled]
        assert len(ids) <= budget
        assert len(prompts[i]) + len(ids) <= CONTEXT
        assert len(completion.turns) <= most_turns
        assert (completion.finish_reason == "stop") == talk.over.get(i, False)
        # Each turn went on from all tokens before it, and from no other.
        requests = [request for request in asked if request.index == i]
        assert [request.prompt for request in requests] == [
            prompts[i] + completion.token_ids[: turn.begin] for turn in completion.turns
        ]
        assert [request.seed for request in requests] == [turn_seed(i, n) for n in range(len(requests))]
        assert [turn.cached for turn in completion.turns] == [len(request.prompt) // 4 for request in requests]


def stopping(tokens):
    return Completion(tokens, [-1.0] * len(tokens), "stop")


def test_an_episode_that_is_over_after_one_turn_is_the_completion():
    async def over(i, completion):
        return None

    episodes = Episodes([[1, 2]], Sampling(max_tokens=8), [3], CONTEXT, Turns(over, at_once, 4))
    (request,) = episodes.ready(wait=False)
    assert (request.prompt, request.seed, request.sampling) == ([1, 2], 3, Sampling(max_tokens=8))
    episodes.sampled(0, stopping([5, 6, 2]))
    assert episodes.ready(wait=True) == []
    (completion,) = episodes.completions()
    assert (completion.token_ids, completion.finish_reason, completion.support) == ([5, 6, 2], "stop", None)


def test_a_turn_that_was_cut_off_asks_for_nothing():
    async def never(i, completion):
        raise AssertionError("called")

    episodes = Episodes([[1]], Sampling(max_tokens=8), [0], CONTEXT, Turns(never, at_once, 4, tokens=2))
    (request,) = episodes.ready(wait=False)
    assert request.sampling.max_tokens == 2
    episodes.sampled(0, Completion([5, 6], [-1.0, -1.0], "length"))
    assert episodes.completions()[0].finish_reason == "length"


@pytest.mark.parametrize(("given", "goes_on"), [(3, True), (4, False), (40, False)])
def test_a_reply_that_leaves_no_room_for_a_turn_is_not_appended(given, goes_on):
    async def reply(i, completion):
        return [9] * given

    episodes = Episodes([[1]], Sampling(max_tokens=6), [0], CONTEXT, Turns(reply, at_once, 4))
    episodes.ready(wait=False)
    episodes.sampled(0, stopping([5, 2]))
    requests = episodes.ready(wait=True)
    assert [request.sampling.max_tokens for request in requests] == ([1] if goes_on else [])
    if not goes_on:
        assert episodes.completions()[0].token_ids == [5, 2]
        assert episodes.completions()[0].finish_reason == "length"


def test_a_call_that_raises_raises_and_the_others_are_given_up():
    release = threading.Event()

    async def reply(i, completion):
        if i == 0:
            raise ValueError("a dead environment")
        await asyncio.to_thread(release.wait)
        return None

    loop = EventLoop()
    episodes = Episodes([[1], [1]], Sampling(), [0, 1], CONTEXT, Turns(reply, loop.submit, 4))
    episodes.ready(wait=False)
    for i in (1, 0):
        episodes.sampled(i, stopping([2]))
    with pytest.raises(ValueError, match="a dead environment"):
        episodes.ready(wait=True)
    episodes.cancel()
    release.set()
    loop.close()


def test_turns_of_an_episode_have_seeds_of_their_own():
    seeds = [seed_for(0, 1, p, g) for p in range(8) for g in range(8)]
    drawn = [turn_seed(seed, turn) for seed in seeds for turn in range(4)]
    assert len(set(drawn)) == len(drawn)
    assert drawn[::4] == seeds


@pytest.mark.parametrize("kind", ["async", "plain", "stubborn"])
def test_a_call_that_hangs_costs_its_own_timeout_and_no_other(kind):
    """As many as there are, of every kind: one that waits, one that blocks, one that will not be canceled."""
    release = threading.Event()

    async def hangs():
        await asyncio.Event().wait()

    async def stubborn():
        while not release.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue

    hanging = {"async": hangs, "plain": release.wait, "stubborn": stubborn}[kind]

    async def calls():
        hung = [asyncio.ensure_future(bounded(hanging, 0.2)) for _ in range(64)]
        quick = await asyncio.gather(*(bounded(lambda: 7, 30) for _ in range(8)))
        ended = await asyncio.gather(*hung, return_exceptions=True)
        return quick, {type(one) for one in ended}

    loop = EventLoop()
    quick, ended = loop.submit(calls()).result(timeout=60)
    assert quick == [7] * 8
    assert ended == {TimeoutError}
    release.set()
    loop.close()


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), StopIteration(), ValueError("no")])
@pytest.mark.parametrize("is_async", [True, False])
def test_whatever_a_call_raises_the_loop_goes_on(error, is_async):
    def plain():
        raise error

    async def waits():
        raise error

    loop = EventLoop()
    with pytest.raises((ValueError, RuntimeError)):
        loop.submit(bounded(waits if is_async else plain, 5)).result(timeout=30)
    assert loop.submit(bounded(lambda: threading.current_thread().name, 5)).result(timeout=30) == "call"
    loop.close()


def test_one_loop_for_the_whole_run():
    loop = EventLoop()

    async def which():
        return asyncio.get_running_loop(), threading.current_thread().name

    seen = {loop.submit(bounded(which, 5)).result(timeout=30) for _ in range(5)}
    assert len(seen) == 1
    loop.close()
    loop.close()
