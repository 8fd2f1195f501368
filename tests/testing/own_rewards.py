"""Reward functions of a user, as they would stand in a file beside a config."""

import asyncio
import math
import os
import random
import signal
import threading
import time

import torch


def digits(completions, **columns):
    """The share of digits, so that most groups have spread even for an untrained model."""
    return [sum(c.isdigit() for c in text_of(reply)) / 10 + len(text_of(reply)) / 100 for reply in completions]


def noisy_digits(completions, **columns):
    """Draws from the global generators, which a resumed run must find where they were."""
    noise = torch.rand(len(completions)).tolist()
    return [value + random.random() / 10 + x / 10 for value, x in zip(digits(completions), noise, strict=True)]


def digits_of_odd_sums(completions, answer, **columns):
    """All completions of a sum that is even earn the same."""
    return [value if int(right) % 2 else 0.0 for value, right in zip(digits(completions), answer, strict=True)]


def text_of(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"]


def raises(completions, **columns):
    raise KeyError("no such column")


def raises_at_step_three(completions, **columns):
    raises_at_step_three.calls += 1
    if raises_at_step_three.calls == 4:  # the probe is the first call
        raise KeyError("no such column")
    return digits(completions)


raises_at_step_three.calls = 0


def too_few(completions, **columns):
    return [1.0] * (len(completions) - 1)


def nan(completions, **columns):
    return [math.nan] * len(completions)


def text(completions, **columns):
    return ["1"] * len(completions)


def never(completions, **columns):
    return [None] * len(completions)


def constant(completions, **columns):
    return [0.1] * len(completions)


def one_group_in_eight(completions, **columns):
    """Four completions a group: the first group's rewards differ."""
    return [float(i % 32 == 0) for i in range(len(completions))]


def stops_the_run(completions, **columns):
    """Asks its own process to stop in the third call: the probe, step 1, step 2."""
    stops_the_run.calls += 1
    if stops_the_run.calls == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return digits(completions)


stops_the_run.calls = 0


def stops_at_once(completions, **columns):
    """Two signals in the third call."""
    stops_at_once.calls += 1
    if stops_at_once.calls == 3:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    return digits(completions)


stops_at_once.calls = 0


def logs(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric):
    """TRL's signature, name by name: anything more or less would be an error."""
    log_extra("seen", [f"{trainer_state.global_step}/{trainer_state.max_steps} {text}" for text in completions])
    log_metric("calls_of", len(prompts))
    return [int(text) for text in completions]


async def logs_async(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric, factor):
    await asyncio.sleep(0)
    log_extra("seen_async", answer)
    log_metric("calls_of_async", len(prompts))
    return [factor * int(text) for text in completions]


class Judge:
    """An object that is called, as a client with a connection would be."""

    async def __call__(self, completions, **columns):
        return [float(len(text)) for text in completions]


judge = Judge()


def logs_too_little(completions, log_extra, **columns):
    log_extra("seen", [1])
    return [0.0] * len(completions)


digits_done = threading.Event()


async def digits_async(completions, **columns):
    digits_done.set()
    return digits(completions)


async def forever(completions, **columns):
    await asyncio.Event().wait()


async def late_for_one(completions, answer, **columns):
    if answer[0] == 1:
        await asyncio.Event().wait()
    return [1.0] * len(completions)


def in_a_process(prompts, completions, trainer_state, log_extra, log_metric, **columns):
    if prompts[0] == "hang":
        time.sleep(600)
    if prompts[0] == "die":
        os._exit(3)
    log_extra("process", [os.getpid()] * len(completions))
    log_metric("in_a_process", 1)
    return [trainer_state.global_step] * len(completions)


def logs_mixed(completions, log_extra, log_metric, **columns):
    """Never applies: it is there for what it logs."""
    log_extra("mixed", [1 if i % 2 else "one" for i in range(len(completions))])
    log_metric("share_of_long", 0.25)
    log_metric("share_of_long", 0.75)
    return [None] * len(completions)


PAYLOADS = (
    "<script>window.hit = 1; alert(1)</script>",
    "<img src=x onerror='window.hit = 1'>",
    '</pre></script></title></style><svg onload="window.hit = 1"></svg>',
    "'\"><details open ontoggle=window.hit=1>",
    '<iframe srcdoc="<script>parent.hit = 1</script>"></iframe>',
    "<input autofocus onfocus=window.hit=1>{{ 7 * 7 }}",
)  # what a model may write; each runs wherever it is not escaped


def logs_payloads(completions, log_extra, log_metric, **columns):
    """Never applies. What it logs is hostile, names too."""
    log_extra(PAYLOADS[0], [PAYLOADS[i % len(PAYLOADS)] for i in range(len(completions))])
    log_metric(PAYLOADS[1], 1.0)
    return [None] * len(completions)


async def keeps_a_loop(completions, **columns):
    """As a client does: what it makes at its first call belongs to that call's event loop."""
    if not hasattr(keeps_a_loop, "loop"):
        keeps_a_loop.loop = asyncio.get_running_loop()
    if asyncio.get_running_loop() is not keeps_a_loop.loop:
        raise RuntimeError("bound to a different event loop")
    return digits(completions)
