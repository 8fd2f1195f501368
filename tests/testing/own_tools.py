"""Tools and environments of a user, as they would stand in a file beside a config."""

import asyncio
import random
import threading
import time
from typing import ClassVar

import numpy

released = threading.Event()


def double(x: int) -> int:
    """Doubles a digit.

    Args:
        x: the digit
    """
    return 2 * x


async def later(x: int) -> str:
    """Doubles a digit, a little later.

    Args:
        x: the digit
    """
    await asyncio.sleep(0.01)
    return f"{2 * x}"


def breaks(x: int) -> int:
    """Breaks.

    Args:
        x: the digit
    """
    raise KeyError(f"no {x}")


def hangs(x: int) -> int:
    """Hangs.

    Args:
        x: the digit
    """
    released.wait()
    return x


class Guess:
    """Counts the digits of a turn, until there are five of them: an environment of the notes' protocol."""

    made: ClassVar[list] = []

    def __init__(self, *, seed, answer=None, **columns):
        self.seed, self.answer, self.columns = seed, answer, columns
        self.digits, self.closed, self.draws = 0, False, []
        Guess.made.append(self)

    async def reply(self, text, message):
        assert message["content"] == text
        self.draws.append((random.random(), float(numpy.random.random())))
        await asyncio.sleep(0)
        self.draws.append((random.random(), float(numpy.random.random())))
        self.digits += sum(letter.isdigit() for letter in text)
        return None if self.digits >= 5 else f"{self.digits} so far"

    async def close(self):
        self.closed = True


class Slow(Guess):
    """Counts how many are being made at a time."""

    making, most, lock = 0, 0, threading.Lock()

    def __init__(self, **columns):
        with Slow.lock:
            Slow.making += 1
            Slow.most = max(Slow.most, Slow.making)
        time.sleep(0.02)
        super().__init__(**columns)
        with Slow.lock:
            Slow.making -= 1


class Dies(Guess):
    """An environment that dies in the first turn of every other episode."""

    async def reply(self, text, message):
        if len(Guess.made) and Guess.made.index(self) % 2:
            raise ConnectionError("the game server is gone")
        return None


class Counter:
    """TRL's form: reset, methods as tools, a reward of its own."""

    def reset(self, **row):
        random.seed(time.time_ns() if row.get("wild") else 7)
        self.count, self.row = 0, row
        return f" Start at {random.randint(0, 1000)}."

    def increase(self, x: int) -> int:
        """Increases the count.

        Args:
            x: by how much
        """
        self.count += x
        return self.count

    def get_reward(self) -> float:
        return float(self.count)


def letters(completions, **columns):
    """A reward with spread, of the last message."""
    texts = [completion[-1]["content"] for completion in completions]
    return [len(set(text)) / 10 for text in texts]


def letters_by_turn(completions, **columns):
    """The same, of each of the assistant's messages."""
    return [
        [len(set(message["content"])) / 10 for message in completion if message["role"] == "assistant"]
        for completion in completions
    ]
