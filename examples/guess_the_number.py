"""Guess The Number of textarena (pip install textarena), as an environment: the game answers each guess."""


def rows(split: str, size: int = 500, most: int = 8) -> list[dict]:
    """Games between 1 and `most`; the column `game` seeds the hidden number."""
    first = 1_000_000 if split == "held out" else 0
    return [row(first + i, most) for i in range(size)]


def row(game: int, most: int) -> dict:
    turns = [
        ("system", f"Game {game}: guess the number between 1 and {most}. Write a guess in brackets, such as [3]."),
        ("user", "Enter your guess."),
    ]
    prompt = [{"role": role, "content": text} for role, text in turns]
    return {"prompt": prompt, "game": game, "most": most}


class Game:
    """One game. textarena seeds and draws from the global `random`, which is this episode's own."""

    def __init__(self, *, seed: int, game: int, most: int, **columns):
        import textarena

        self.score, self.env = 0.0, textarena.make("GuessTheNumber-v0-raw", min_number=1, max_number=most)
        self.env.reset(num_players=1, seed=game)
        self.env.get_observation()  # the rules, which are in the prompt

    def reply(self, text: str, message: dict) -> str | None:
        done, _ = self.env.step(text)
        if done:
            rewards, _ = self.env.close()
            self.score = float(rewards[0])
            return None
        _, observations = self.env.get_observation()
        return str(observations[-1][1])


def solved(completions, environments, **columns):
    """1 for the number, less for a game that ended before: as near as its last guess was."""
    return [0.0 if environment is None else environment.score for environment in environments]
