"""The problems of a run, and the rewards of their completions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from longgrpo.config.check import require


@dataclass(frozen=True)
class HeldOutConfig:
    """A further held-out set, evaluated whenever the first one is."""

    name: str | None = None
    """Its source, in the form of task.name; default: task.name."""
    parameters: dict[str, Any] | None = None
    """Arguments of the source; default: task.parameters, or none if `name` is set."""
    split: str | None = None
    """Its split of a data set; default: task.split."""
    n: int = 200
    """Number of problems, all different and never trained on."""
    seed: int = 1_000_000_007
    """Seed of the problems."""
    reward: str | None = None
    """The reward function that says whether a problem is solved; default: task.eval_reward."""
    turns: bool = True
    """false: a control. The prompts are the same, and neither tools nor the environment answer: the first turn is the
    reply."""

    def __post_init__(self) -> None:
        require(self.n >= 1, f"n = {self.n}: must be at least 1; leave the set out instead")


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
    long_prompts: Literal["refuse", "drop", "cut"] = "refuse"
    """What happens to prompts that leave no room for a completion in the context. They are counted before training.
    refuse: the run does not begin; drop: they are left out; cut: they lose their beginning, so that a whole completion
    fits."""
    tools: list[str] = field(default_factory=list)
    """Functions that the model may call: package.module:function, path/to/file.py:function, with types and a docstring,
    `async` or not. See docs/tools.md."""
    tool_pattern: str | None = None
    """A regular expression that finds calls in a turn, with a named group for each argument, and a group `tool` if
    there are several tools; default: the format of the chat template (Hermes and Qwen, Llama 3, Mistral, Phi-4)."""
    environment: str | None = None
    """A class that answers the turns of an episode: package.module:Class, path/to/file.py:Class. TRL's
    environment_factory classes are taken as they are."""
    call_timeout: float = 30.0
    """Seconds that a call of a tool, or a reply of the environment, may take."""
    on_error: Literal["raise", "drop", "tell"] | None = None
    """What happens after a call that raises or takes too long. raise: the run stops and can be resumed; drop: the
    episode is left out of its group; tell: the model reads an error. Default: tell for a tool, drop for the
    environment. A call that cannot be read is always told."""
    result_tokens: int = 256
    """Longest result of a call, or reply of the environment, in tokens: the rest is cut, and the model is told."""
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

    eval_steps: int = 0
    """Number of steps between evaluations during training; 0: only before and after it. An evaluation changes nothing
    of the training."""
    eval_samples: int = 0
    """Replies that are sampled for each held-out problem beside the greedy one, as training samples them: their mean
    accuracy (mean@k) and pass@k. 0: only the greedy one."""
    eval_patience: int = 0
    """The run ends after this many evaluations in a row without a higher train.best_metric; 0: never."""
    eval_sets: dict[str, HeldOutConfig] = field(default_factory=dict)
    """Further held-out sets by name, unless eval_n is 0: their metrics are eval/NAME/accuracy and so on."""

    def __post_init__(self) -> None:
        require(self.eval_n >= 0, f"eval_n = {self.eval_n}: must be 0 (no evaluation) or more")
        for name in ("eval_steps", "eval_samples", "eval_patience"):
            require(getattr(self, name) >= 0, f"{name} = {getattr(self, name)}: must not be negative")
            require(
                self.eval_n > 0 or not getattr(self, name),
                f"{name} = {getattr(self, name)} and eval_n = 0: there is nothing to evaluate on; set eval_n",
            )
        require(
            self.eval_steps > 0 or not self.eval_patience,
            f"eval_patience = {self.eval_patience} counts evaluations during training: set eval_steps",
        )
        require(self.call_timeout > 0, f"call_timeout = {self.call_timeout}: must be above 0 seconds")
        require(self.result_tokens >= 1, f"result_tokens = {self.result_tokens}: must be at least 1")
        require(
            bool(self.tools) or not self.tool_pattern,
            f"tool_pattern = {self.tool_pattern!r} finds calls of tools, and there are none: set tools",
        )
        for name in self.eval_sets:
            require(name.isidentifier(), f"eval_sets: {name!r} is part of a metric's name: take letters and digits")

    @property
    def takes_turns(self) -> bool:
        """Whether a completion is an episode, with calls or replies between its turns."""
        return bool(self.tools or self.environment)

    @property
    def held_out(self) -> dict[str, TaskConfig]:
        """The held-out sets by name, each as a task that has only it: "" is the first."""
        if not self.eval_n:
            return {}
        further = {
            name: replace(
                self,
                name=given.name or self.name,
                parameters=(given.parameters or {}) if given.name else given.parameters or self.parameters,
                eval_name=None,
                eval_split=given.split,
                eval_n=given.n,
                eval_seed=given.seed,
                eval_reward=given.reward or self.eval_reward,
                tools=self.tools if given.turns else [],
                tool_pattern=self.tool_pattern if given.turns else None,
                environment=self.environment if given.turns else None,
                eval_sets={},
            )
            for name, given in self.eval_sets.items()
        }
        return {"": replace(self, name=self.eval_name or self.name, eval_name=None, eval_sets={}), **further}


@dataclass(frozen=True)
class LimitsConfig:
    """What a reward function in a process of its own may use; see docs/security.md for what each limit stops."""

    memory_gib: float | None = None
    """GiB that its processes may hold together, beyond what the first has after it has loaded the function. Each may
    allocate as much; more is a MemoryError there, and all together beyond it are ended."""
    processes: int | None = None
    """Number of processes, its own included. With more, all are ended."""
    file_size_mib: float | None = None
    """MiB that a file may have that it writes; more is an OSError there."""
    network: bool = True
    """false: no network, not even the machine's own. If the kernel allows no network namespaces, the run is refused."""

    def __post_init__(self) -> None:
        for name, unit in (("memory_gib", "GiB"), ("processes", "processes"), ("file_size_mib", "MiB")):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} = {value}: must be above 0 {unit}; leave it out for no limit")


@dataclass(frozen=True)
class RewardConfig:
    """One reward function and its weight in the sum; see docs/rewards.md."""

    function: str | None = None
    """A built-in (exact_answer, numeric_answer, math_answer, score_answer, graded_error, matches_format, target_length,
    soft_overlong, environment_reward), package.module:function or path/to/file.py:function."""
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
    limits: LimitsConfig | None = None
    """What that process may use; with limits the function is isolated."""
    model: str | None = None
    """Instead of a function: a reward model, a sequence classifier of transformers with one label (a directory or a hub
    id). parameters: dtype, batch_size, max_length."""

    def __post_init__(self) -> None:
        require(bool(self.function) != bool(self.model), "a reward has either `function` or `model`")
        require(
            not self.model or (self.timeout is None and not self.isolate and not self.limits),
            "a model runs in the trainer's process: leave out timeout, isolate and limits",
        )
        require(self.timeout is None or self.timeout > 0, f"timeout = {self.timeout}: must be above 0 seconds")

    @property
    def label(self) -> str:
        return (
            self.name or (self.function or "").rpartition(":")[2] or (self.model or "").rstrip("/").rpartition("/")[2]
        )
