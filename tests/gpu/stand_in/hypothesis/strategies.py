"""The strategies that tests/testing/cases.py uses."""

from __future__ import annotations


class Strategy:
    def __init__(self, draw):
        self.draw = draw

    def filter(self, keep) -> Strategy:
        def draw(source):
            while True:
                value = self.draw(source)
                if keep(value):
                    return value

        return Strategy(draw)


def integers(low: int, high: int) -> Strategy:
    return Strategy(lambda source: source.randint(low, high))


def booleans() -> Strategy:
    return Strategy(lambda source: source.random() < 0.5)


def sampled_from(choices) -> Strategy:
    return Strategy(lambda source: source.choice(list(choices)))


def lists(elements: Strategy, *, min_size: int = 0, max_size: int = 10) -> Strategy:
    return Strategy(lambda source: [elements.draw(source) for _ in range(source.randint(min_size, max_size))])


def composite(function):
    def make(*arguments, **options) -> Strategy:
        return Strategy(lambda source: function(lambda strategy: strategy.draw(source), *arguments, **options))

    return make
