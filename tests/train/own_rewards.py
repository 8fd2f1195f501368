"""Reward functions of a user, as they would stand in a file beside a config."""

import math
import os
import random
import signal

import torch


def digits(completions, **columns):
    """The share of digits, so that most groups have spread even for an untrained model."""
    return [sum(c.isdigit() for c in text_of(reply)) / 10 + len(text_of(reply)) / 100 for reply in completions]


def noisy_digits(completions, **columns):
    """Draws from the global generators, which a resumed run must find where they were."""
    noise = torch.rand(len(completions)).tolist()
    return [value + random.random() / 10 + x / 10 for value, x in zip(digits(completions), noise, strict=True)]


def text_of(completion):
    return completion[-1]["content"]


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
