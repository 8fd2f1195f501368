"""A run's parts, built from its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longgrpo.checks.rehearsal import Forecast, forecast_run
from longgrpo.config.run import TrainConfig
from longgrpo.errors import ConfigError
from longgrpo.model.load import end_token_ids, load_tokenizer, resolve_model
from longgrpo.model.lora import with_adapter
from longgrpo.offload import OffloadEngine
from longgrpo.rollout.factory import make_engine
from longgrpo.rollout.probe import Probe
from longgrpo.rollout.protocol import max_length
from longgrpo.run.callbacks import Callbacks
from longgrpo.run.evaluations import Evaluations
from longgrpo.run.given import config_with, objects_of
from longgrpo.run.problems import problems_of
from longgrpo.run.tracking import check_installed
from longgrpo.tasks.episodes import make_conversations, prompts_for
from longgrpo.tasks.event_loop import EventLoop
from longgrpo.tasks.load_reward import load_reward
from longgrpo.tasks.rewards import Rewarding
from longgrpo.train.collect import Collector
from longgrpo.train.loop import Loop
from longgrpo.train.losses import PolicyLoss
from longgrpo.train.ranks import Ranks
from longgrpo.train.state import make_state


@dataclass(frozen=True)
class Built:
    config: TrainConfig
    """With what the run's objects and its adapter add to it."""
    loop: Loop
    evaluations: Evaluations
    callbacks: Callbacks
    forecast: Forecast | None


def build(config: TrainConfig, directory: Path, force: bool, given: Mapping[str, Any], ranks: Ranks) -> Built:
    """Everything that can be refused is looked at first: the engine is slow to start."""
    config, objects = with_adapter(config_with(config, given)), objects_of(given)
    if config.train.prompts_per_step < ranks.world:
        raise ConfigError(
            f"train.prompts_per_step = {config.train.prompts_per_step}, and there are {ranks.world} ranks: each needs "
            "a prompt; raise it, or start fewer ranks"
        )
    callbacks = Callbacks(config, directory, given.get("callbacks") or (), ranks)
    check_installed(config.log.to)
    rewards = [load_reward(reward, objects) for reward in config.rewards]
    loss = PolicyLoss(config)
    try:
        model_directory = ranks.in_turn(lambda: resolve_model(config.model.path, config.model.quantization))
        context = max_length(config.rollout, model_directory)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    tokenizer = load_tokenizer(model_directory, config.task.chat_template)
    calls = EventLoop()
    talks = make_conversations(config, tokenizer, end_token_ids(model_directory), calls, objects)
    as_tokens = prompts_for(config, tokenizer, context, talks)
    held_out, stream = problems_of(config, as_tokens, objects)
    evaluations = Evaluations(config, directory, held_out, rewards[0])
    if ranks.is_first:
        evaluations.check()
    first = stream.peek(config.train.prompts_per_step)
    problems = [*first, *(problem for problems in held_out.values() for problem in problems)]
    prompts = [as_tokens.encode(problem) for problem in problems]
    forecast = forecast_run(config, max(map(len, prompts)), force, ranks.layout)
    try:
        engine = make_engine(config.rollout, config.model, config.lora)
    except (ValueError, NotImplementedError, ImportError) as error:
        raise ConfigError(str(error)) from error
    probe = Probe(prompts[0], engine, config.rollout, config.model.dtype)
    try:
        state = make_state(
            config, engine, OffloadEngine(**config.memory.depths) if config.memory.offload else None, ranks
        )
    except (ValueError, NotImplementedError) as error:
        engine.close()
        raise ConfigError(str(error)) from error
    collector = Collector(config, engine, tokenizer, Rewarding(rewards, calls), stream, talks, ranks)
    return Built(config, Loop(config, collector, state, loss, probe), evaluations, callbacks, forecast)
