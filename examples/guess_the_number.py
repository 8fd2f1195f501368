"""Guess The Number of textarena (pip install textarena), as an environment: the game answers each guess."""

# Whoever halves what is left finds any of 15 numbers in 4 guesses; whoever starts in the middle and counts, 7 of them.
MOST, GUESSES = 15, 4
EXAMPLE = [
    ("system", f"Find the number between 1 and {MOST} in at most {GUESSES} guesses. Write a guess in brackets."),
    ("user", "Game 0: enter your guess."),
    ("assistant", "[8]"),
    ("user", "The target number is higher."),
    ("assistant", "[12]"),
    ("user", "The target number is lower."),
    ("assistant", "[10]"),
    ("user", "The target number is higher."),
    ("assistant", "[11]"),
]


def rows(split: str, size: int = 500) -> list[dict]:
    """Games after one that was played well; the column `game` seeds the hidden number."""
    first = 1_000_000 if split == "held out" else 1
    return [row(first + i) for i in range(size)]


def row(game: int) -> dict:
    turns = [*EXAMPLE, ("user", f"Game {game}: enter your guess.")]
    return {"prompt": [{"role": role, "content": text} for role, text in turns], "game": game}


class Game:
    """One game. textarena seeds and draws from the global `random`, which is this episode's own."""

    def __init__(self, *, seed: int, game: int, **columns):
        import textarena

        self.score = 0.0
        turns = GUESSES - 1  # textarena ends the game after the guess that passes its limit
        self.env = textarena.make("GuessTheNumber-v0-raw", min_number=1, max_number=MOST, max_turns=turns)
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
