"""What a reward function can do to the run, from its own process and from the trainer's."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import pytest
from transformers import TrainerState

from longgrpo.config.task import LimitsConfig, RewardConfig
from longgrpo.errors import ConfigError, RewardError
from longgrpo.rollout.protocol import Completion
from longgrpo.tasks.data import Problem
from longgrpo.tasks.load_reward import load_reward
from longgrpo.tasks.rewards import Rewarding
from longgrpo.tasks.sample import Sample
from testing import OWN_REWARDS

ATTACKS = OWN_REWARDS.with_name("own_attacks.py")


def isolated(timeout=60.0, **limits):
    given = LimitsConfig(**limits) if limits else None
    return load_reward(RewardConfig(f"{ATTACKS}:does", isolate=True, timeout=timeout, limits=given))


@pytest.fixture(scope="module")
def plain_worker():
    reward = isolated()
    yield reward
    reward.close()


def ask(reward, what):
    return reward([what] * 2, ["a", "b"], [[1], [2]], {})


def test_a_result_is_data(plain_worker, tmp_path):
    with pytest.raises(RewardError, match=r"returned .*Payload"):
        ask(plain_worker, f"pickle {tmp_path / 'hit'}")
    assert not (tmp_path / "hit").exists()


def test_it_may_start_processes(plain_worker):
    assert ask(plain_worker, "pool").values.tolist() == [14.0, 14.0]


@pytest.mark.parametrize("timeout", [3.0])
def test_what_it_has_started_ends_with_it(plain_worker, tmp_path, timeout):
    plain_worker.timeout = timeout
    with pytest.raises(RewardError, match="longer than its timeout"):
        ask(plain_worker, f"children {tmp_path / 'alive'}")
    plain_worker.timeout = 60.0
    assert (tmp_path / "alive").stat().st_size > 0
    assert not growing(tmp_path / "alive")


def test_its_exit_is_an_error(plain_worker):
    with pytest.raises(RewardError, match="does raised SystemExit: 0"):
        ask(plain_worker, "exit")


def test_half_an_answer_does_not_hang(plain_worker):
    plain_worker.timeout = 3.0
    with pytest.raises(RewardError, match="longer than its timeout"):
        ask(plain_worker, "raw")
    plain_worker.timeout = 60.0
    assert ask(plain_worker, "fine").values.tolist() == [0.5, 0.5]


@pytest.fixture(scope="module")
def limited():
    reward = isolated(memory_gib=0.25, processes=4, file_size_mib=1)
    yield reward
    reward.close()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (f"memory {1 << 30}", "MemoryError"),
        (f"together {100 << 20}", r"it held 0\.\d+ GiB, limits.memory_gib is 0.25"),
        ("processes 6", "it had [5-7] processes, limits.processes is 4"),
        ("file FILE", "File too large"),
    ],
)
def test_limits(limited, tmp_path, what, message):
    with pytest.raises(RewardError, match=message):
        ask(limited, what.replace("FILE", str(tmp_path / "large")))
    assert ask(limited, f"memory {1 << 20}").values.tolist() == [1 << 20] * 2


def test_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        try:
            reward = isolated(network=False)
        except ConfigError as error:  # never silently with one
            if "does not allow a network namespace" not in str(error):
                raise
            pytest.skip(str(error))
        with pytest.raises(RewardError, match=r"Network is unreachable|Connection refused|Cannot assign"):
            ask(reward, f"network {port}")
        reward.close()


def test_a_worker_ends_with_its_trainer(tmp_path):
    code = (
        "import os, sys, signal\n"
        "from longgrpo.config.task import RewardConfig\n"
        "from longgrpo.tasks.load_reward import load_reward\n"
        f"reward = load_reward(RewardConfig({str(ATTACKS) + ':does'!r}, isolate=True))\n"
        "print(reward.worker._process.pid, flush=True)\n"
        f"reward(['children {tmp_path / 'alive'}'], ['a'], [[1]], {{}})\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert int(trainer.stdout.readline()) > 0
    while not (tmp_path / "alive").exists():
        time.sleep(0.05)
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 60
    while growing(tmp_path / "alive"):
        assert time.monotonic() < deadline


def growing(path):
    size = path.stat().st_size
    time.sleep(0.5)
    return path.stat().st_size > size


# ---- in the trainer's own process


def rewarding(name, **options):
    return Rewarding([load_reward(RewardConfig(f"{ATTACKS}:{name}", **options))])


def run(work, groups=3):
    problems = [Problem(str(g), f"prompt {g}", {"answer": g}) for g in range(groups) for _ in range(2)]
    samples = [Sample(i // 2, [1], Completion([1], [0.0], "stop"), str(i)) for i in range(2 * groups)]
    for g in range(groups):
        work.begin(problems[2 * g], samples[2 * g : 2 * g + 2], TrainerState())
    try:
        return work.finish(problems, samples, TrainerState()).tolist()[0]
    finally:
        work.close()


@pytest.mark.parametrize("name", ["exits", "exits_async"])
def test_sys_exit_is_an_error_of_the_function(name):
    with pytest.raises(RewardError, match=rf"{name} raised SystemExit: 0"):
        run(rewarding(name))
    values = run(rewarding(name, on_error="none"))
    assert len(values) == 6
    assert all(value != value for value in values)


def test_a_timeout_stops_an_async_function_that_blocks():
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"blocks took longer than its timeout of 0\.2 s"):
        run(rewarding("blocks", timeout=0.2))
    reward = load_reward(RewardConfig(f"{ATTACKS}:blocks", timeout=0.2))
    with pytest.raises(RewardError, match=r"blocks took longer than its timeout of 0\.2 s"):
        reward(["p"], ["c"], [[1]], {})
    work = rewarding("blocks_for_one", timeout=0.2, on_error="none")
    assert run(work, groups=1) == [1.0, 1.0]
    assert time.monotonic() - start < 25  # a function blocks for 30 seconds


def test_a_metric_of_the_trainers_is_not_replaced():
    with pytest.raises(RewardError, match="logs the metric 'reward/mean', which is the trainer's: take another name"):
        run(rewarding("logs_a_name_of_the_trainers"))
