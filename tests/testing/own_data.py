"""Problems and a curriculum of a user, as they would stand in a file beside a config."""

from longgrpo.tasks.data import Sampler


def thirty(split):
    return [{"prompt": f"What is {i}?", "answer": str(i), "level": {"digits": len(str(i))}} for i in range(30)]


def numbered(split, count):
    return [{"prompt": f"{split} {i}"} for i in range(count)]


class Harder(Sampler):
    """Problems of one digit until they are solved, then of two."""

    def __init__(self, source, seed):
        super().__init__(source, seed)
        self.digits = 1

    def index(self, position):
        level = [i for i in range(len(self.source)) if self.source[i].columns["level"]["digits"] == self.digits]
        return level[position % len(level)]

    def observe(self, problems, rewards):
        if rewards.mean() > 0.9:
            self.digits = 2

    def state(self):
        return {"digits": self.digits}

    def restore(self, state):
        self.digits = state["digits"]
