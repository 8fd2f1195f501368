"""Optimizers and schedules by name: each steps as its own class does, and is resumed bit for bit."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from longgrpo.config.optimizer import OPTIMIZERS, SCHEDULES
from longgrpo.config.run import build_config
from longgrpo.config.train import LoopConfig
from longgrpo.errors import ConfigError
from longgrpo.run import checkpoint
from longgrpo.run.trainer import Trainer
from longgrpo.train.optimizer import make_optimizer

ARGUMENTS = {"sgd": {"momentum": 0.9}, "adamw": {"eps": 1e-3}}
NAMES = list(OPTIMIZERS)


def parameters(seed=0):
    """The first is large enough for bitsandbytes to keep its state in 8 bits."""
    torch.manual_seed(seed)
    shapes = {"a": (128, 64), "b": (3, 2)}
    return {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


def advance(some, optimizer, times=1):
    for _ in range(times):
        for i, parameter in enumerate(some.values()):
            parameter.grad = torch.cos(parameter.detach() * (i + 1))
        optimizer.step()


def made(name, some):
    if OPTIMIZERS[name].module != "torch.optim":
        pytest.importorskip("bitsandbytes")
    return make_optimizer(some.values(), LoopConfig(optimizer=name, learning_rate=0.1, weight_decay=0.01,
                                                    optim_args=ARGUMENTS.get(name, {})))  # fmt: skip


DIRECT = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.01),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.9, 0.99), weight_decay=0.01, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=0.01),
    "muon": lambda p: torch.optim.Muon(p, lr=0.1, weight_decay=0.01),
}


@pytest.mark.parametrize("name", DIRECT)
def test_a_name_is_its_class_with_the_arguments_of_the_config(name):
    ours, direct = parameters(), parameters()
    advance(ours, made(name, ours), 3)
    advance(direct, DIRECT[name](direct.values()), 3)
    assert all(torch.equal(ours[key], direct[key]) for key in ours)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", NAMES)
def test_it_is_resumed_bit_for_bit(name, tmp_path):
    whole = parameters()
    optimizer = made(name, whole)
    advance(whole, optimizer, 2)
    checkpoint.save(tmp_path, 2, whole, optimizer, {}, None, 1)
    advance(whole, optimizer, 2)
    resumed = parameters(seed=1)
    fresh = made(name, resumed)
    checkpoint.load(checkpoint.checkpoints(tmp_path)[-1], resumed, fresh)
    advance(resumed, fresh, 2)
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_eight_bits_take_a_quarter_of_the_memory():
    some = parameters()
    optimizer = made("adamw_8bit", some)
    advance(some, optimizer)
    state = optimizer.state[some["a"]]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8


def test_another_optimizer_begins_anew(tmp_path, caplog):
    some = parameters()
    optimizer = made("sgd", some)
    advance(some, optimizer)
    checkpoint.save(tmp_path, 1, some, optimizer, {}, None, 1)
    fresh = made("adamw", some)
    checkpoint.load(checkpoint.checkpoints(tmp_path)[-1], some, fresh)
    assert "has the state of SGD: AdamW begins without" in caplog.text
    advance(some, fresh)


def trained(tree, directory, **train):
    tree["train"] |= train
    tree["task"]["eval_n"] = 0
    return Trainer(build_config(tree), directory)


@pytest.mark.parametrize("name", ["muon", "adamw_8bit"])
def test_a_run_trains_with_it(tree, tmp_path, name):
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    assert trained(tree, tmp_path / "run", optimizer=name, steps=2).run()["steps"] == 2
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(row["grad_norm"] > 0 for row in rows[1:])


def test_one_of_ones_own(tree, tmp_path):
    own = tmp_path / "own.py"
    own.write_text(
        "import torch\n"
        "class Signs(torch.optim.SGD):\n"
        "    def step(self):\n"
        "        for group in self.param_groups:\n"
        "            for p in group['params']: p.grad.sign_()\n"
        "        return super().step()\n"
    )
    running = trained(tree, tmp_path / "run", optimizer=f"{own}:Signs").loop
    assert type(running.state.optimizer).__name__ == "Signs"
    assert running.state.optimizer.param_groups[0]["lr"] == 1e-2


def test_what_it_does_not_take_is_refused_before_training(tree, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"optimizer = 'adamw'.*unexpected keyword.*AdamW takes lr, betas, eps"):
        trained(tree, tmp_path / "a", optim_args={"epsilon": 1e-6})
    with pytest.raises(ConfigError, match=r"optimizer = 'adamv': there is no such one; is it adamw\?"):
        trained(tree, tmp_path / "b", optimizer="adamv", optim_args={})
    with pytest.raises(ConfigError, match=r"schedule = 'cosin': there is no such one; is it cosine\?"):
        trained(tree, tmp_path / "c", optimizer="adamw", schedule="cosin")
    with pytest.raises(ConfigError, match=r"schedule = 'cosine_with_min_lr', train.schedule_args = \{\}.*min_lr"):
        trained(tree, tmp_path / "d", schedule="cosine_with_min_lr")
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match=r"optimizer = 'adamw_8bit' needs bitsandbytes"):
        trained(tree, tmp_path / "e", schedule="constant", optimizer="adamw_8bit")
    del tree["lora"]
    with pytest.raises(ConfigError, match=r"optimizer = 'muon'.*it steps matrices only.*add a lora group"):
        trained(tree, tmp_path / "f", optimizer="muon")


@pytest.mark.parametrize("name", SCHEDULES)
def test_after_the_warm_up_the_rate_is_that_of_transformers(name):
    from transformers import get_scheduler

    arguments = {
        "cosine_with_restarts": {"num_cycles": 2}, "polynomial": {"power": 2.0}, "cosine_with_min_lr": {"min_lr": 0.1},
        "cosine_warmup_with_min_lr": {"min_lr_rate": 0.2}, "warmup_stable_decay": {"num_decay_steps": 3},
    }.get(name, {})  # fmt: skip
    config = LoopConfig(steps=10, learning_rate=0.5, warmup_steps=2, schedule=name, schedule_args=arguments)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = get_scheduler(name, optimizer, 2, 10, scheduler_specific_kwargs=arguments)
    rates = []
    for _ in range(10):
        rates.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    ours = [config.learning_rate_at(step) for step in range(1, 11)]
    assert ours[2:] == pytest.approx(rates[2:])
    assert ours[:2] == pytest.approx([0.25, 0.5])
    assert name == "constant" or len(set(ours[2:])) >= 3


def test_the_plan_counts_the_state(tree):
    def bytes_of(**train):
        return build_config(tree | {"train": train}).train.state_bytes

    assert bytes_of() == 8
    assert bytes_of(optimizer="sgd") == 0
    assert bytes_of(optimizer="sgd", optim_args={"momentum": 0.9}) == 4
    assert bytes_of(optimizer="adamw_8bit") == 2
