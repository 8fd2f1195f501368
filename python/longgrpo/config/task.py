"""The problems of a run, and the rewards of their completions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from longgrpo.config.check import require


@dataclass(frozen=True)
class TaskConfig:
    """The problems. A row of data has a prompt, as text or as messages; its other columns are passed to the rewards."""

    name: str
    """A task of reasoning_gym (such as chain_sum), a .jsonl or .parquet file, a directory written by datasets, a hub
    id (owner/name), or a function of your own (package.module:function, path/to/file.py:function), which is called with
    `split` and `parameters` and returns a sequence of rows."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """Arguments of the task, of datasets or of the function. `size` of a reasoning_gym task is the number of different
    problems before they repeat."""
    split: str = "train"
    """The split of a data set."""
    prompt_column: str | None = None
    """The column with the prompt; default: prompt, and question for reasoning_gym."""
    seed: int = 0
    """Seed of a reasoning_gym task's training problems, and of the order of other rows."""
    shuffle: bool = True
    """Draw rows in a new random order each epoch. A reasoning_gym task is random already and stays in order."""
    sampler: str | None = None
    """A curriculum: path/to/file.py:Class, a longgrpo.tasks.data.Sampler that chooses the next problem."""
    chat: bool | None = None
    """Whether a prompt of plain text is sent as a user message; default: if the model has a chat template (TRL leaves
    plain text as it is)."""
    chat_template: str | None = None
    """A jinja file that replaces the model's chat template."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the chat template, for example {enable_thinking: false}."""
    system_prompt: str | None = None
    """The system prompt of every conversation that does not have its own."""
    eval_n: int = 200
    """Number of held-out problems, all different and never trained on; 0: no evaluation."""
    eval_name: str | None = None
    """The source of the held-out problems, in the form of `name`; default: the same source."""
    eval_split: str | None = None
    """Their split of a data set; default: `split`, whose held-out problems training skips."""
    eval_seed: int = 1_000_000_007
    """Seed of the held-out problems."""
    eval_reward: str | None = None
    """The reward function that says whether a held-out problem is solved (>= 1); default: the first of `rewards`."""
    eval_prefill: str | None = None
    """A control: the untrained model is also evaluated with this template as the beginning of its reply. It is filled
    from the columns and metadata of a problem, for example "{expression} ="."""

    def __post_init__(self) -> None:
        require(self.eval_n >= 0, f"eval_n = {self.eval_n}: must be 0 (no evaluation) or more")


@dataclass(frozen=True)
class RewardConfig:
    """One reward function and its weight in the sum; see docs/rewards.md."""

    function: str
    """A built-in (exact_answer, numeric_answer, math_answer, score_answer, graded_error, matches_format, target_length,
    soft_overlong), package.module:function or path/to/file.py:function."""
    weight: float = 1.0
    """0: the function is only logged."""
    name: str | None = None
    """Its name in the logs; default: the function's name."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the function."""
    timeout: float | None = None
    """Seconds that a call may take. With a limit, a function that is not async runs in a process of its own."""
    on_error: Literal["raise", "none"] = "raise"
    """What happens after an exception, a timeout or an unusable value. raise: the run stops and can be resumed; none:
    the reward does not apply to the completions of the call."""
    isolate: bool = False
    """Run the function in a process of its own."""

    def __post_init__(self) -> None:
        require(self.timeout is None or self.timeout > 0, f"timeout = {self.timeout}: must be above 0 seconds")

    @property
    def label(self) -> str:
        return self.name or self.function.rpartition(":")[2]
