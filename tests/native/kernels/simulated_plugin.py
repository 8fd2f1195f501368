"""pytest -p simulated_plugin: the loss ops on the CPU become the CUDA path on the simulator, for any test of the loss.

--simulated-tiles ROWS,CHUNK forces a tiling: rows of a tile, and columns of a chunk (0: whole rows).
--simulated-score: calls without a gradient are scored by the tensor-core kernel where it can.
--simulated-schedule forward, reverse or shuffled. --simulated-examples caps what hypothesis tries.
--simulated-launched FILE: the names of the kernels that were launched.
"""

from pathlib import Path

import simulated
import torch
from hypothesis import settings

import longgrpo._ops.loss
from testing import cases

_make_head = cases.make_head


def make_head(seed, tokens, hidden, vocabulary, dtype=torch.float32, *, bias=False, **options):
    """No bias for half dtypes: its gradient sums rows that are rounded to the dtype, which the CPU's does not. Where
    they cancel that is more than the CPU's bound; test_kernels looks at the rows."""
    return _make_head(seed, tokens, hidden, vocabulary, dtype, bias=bias and dtype is torch.float32, **options)


cases.make_head = make_head

_SIMULATED = torch.library.Library("longgrpo", "IMPL")


def pytest_addoption(parser):
    parser.addoption("--simulated-tiles", default="0,0")
    parser.addoption("--simulated-score", action="store_true")
    parser.addoption("--simulated-schedule", default="forward", choices=simulated.SCHEDULES)
    parser.addoption("--simulated-examples", type=int, default=50)
    parser.addoption("--simulated-launched", help="a file for the names of the kernels that were launched")


def pytest_configure(config):
    for name in ("linear_logprob", "linear_logprob_backward", "token_loss", "linear_grpo_loss", "scale_rows"):
        _SIMULATED.impl(name, getattr(simulated, name), "CPU", allow_override=True)
    longgrpo._ops.loss.weight_by_itself = lambda hidden: True
    simulated.replaced = True
    simulated.kernels().force_tiles(*map(int, config.getoption("--simulated-tiles").split(",")))
    simulated.kernels().force_score(0 if config.getoption("--simulated-score") else -1)
    simulated.kernels().set_schedule(simulated.SCHEDULES[config.getoption("--simulated-schedule")])


def pytest_collection_modifyitems(config, items):
    cap = config.getoption("--simulated-examples")
    for item in items:
        own = getattr(item.obj, "_hypothesis_internal_use_settings", None)
        if own is not None:
            item.obj._hypothesis_internal_use_settings = settings(
                own, max_examples=min(cap, own.max_examples), derandomize=True, database=None
            )


def pytest_sessionfinish(session):
    """A run that never reached the simulator would prove nothing."""
    if session.testscollected and not simulated.kernels().launches():
        session.exitstatus = 1
    if path := session.config.getoption("--simulated-launched"):
        Path(path).write_text("\n".join(sorted(simulated.kernels().launched())) + "\n")
