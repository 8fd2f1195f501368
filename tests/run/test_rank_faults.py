"""What goes wrong on one rank ends all, is told once and by its name, and loses nothing that one rank would keep."""

from __future__ import annotations

import functools
import os
import random
import runpy
import signal
import subprocess
import sys
import time

import pytest

from longgrpo.run import checkpoint
from testing import OWN_REWARDS, ROOT
from testing.commands import write_config
from testing.full_disk import limited_file_size
from testing.ranks import Ranked, command, free_port, run_ranks

RANKED_REWARDS = OWN_REWARDS.with_name("ranked_rewards.py")
differences = runpy.run_path(str(ROOT / "bench" / "resume.py"))["differences"]
TIMEOUT = 15  # seconds: the longest that an idle rank may wait for one on a busy machine


@pytest.fixture
def config(tree, tmp_path):
    """Of a run of 4 steps, saved at each second: `config(function, ...)` is its file."""

    def write(function="digits", **groups):
        tree["rewards"] = [{"function": f"{RANKED_REWARDS}:{function}"}]
        tree["train"] |= {"prompts_per_step": 4, "probe_prompts": 0, **groups.pop("train", {})}
        tree["task"] = {**tree["task"], "eval_n": 0, **groups.pop("task", {})}
        tree["log"] = {"to": []}
        return write_config(tree | groups, tmp_path / "config.yaml")

    return write


def train(tmp_path, *arguments, world=2, **environment):
    return run_ranks(world, tmp_path / "logs", command, "train", *map(str, arguments), **environment)


def saved(run):
    return [checkpoint.step_of(path) for path in checkpoint.checkpoints(run)]


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def started(config_file, run):
    return [config_file, "--output_dir", run]


@pytest.mark.parametrize("function", ["raises_on_rank_one", "raises_everywhere"])
def test_a_reward_that_raises_ends_all_and_the_last_whole_step_is_saved(config, run, tmp_path, function):
    first, second = train(tmp_path, *started(config(function), run))
    assert (first.status, second.status) == (2, 2)
    assert f"reward function {function} raised KeyError" in first.said
    assert ("rank 1: reward function" in first.said) == (function == "raises_on_rank_one")
    assert f"saved at step 2; go on with: longgrpo train --resume {run}" in first.said
    assert "longgrpo:" not in second.said  # rank 0 has told it
    assert saved(run)[-1] == 2


@pytest.mark.parametrize(
    ("function", "groups"),
    [
        ("breaks_the_backward", {}),
        ("breaks_amid_the_backward", {"lora": None, "memory": {"shard_gradients": True}}),
    ],
)
def test_a_fault_of_the_program_on_one_rank_has_its_traceback_there(config, run, tmp_path, function, groups):
    first, second = train(tmp_path, *started(config(function, **groups), run))
    assert (first.status, second.status) == (2, 1)
    assert "longgrpo: rank 1: RuntimeError: planted" in first.said
    assert "Traceback" not in first.said
    assert "RuntimeError: planted" in second.said
    assert "saved at step 2" in first.said
    assert saved(run)[-1] == 2


def test_a_rank_that_hangs_is_named(config, run, tmp_path):
    file = config("hangs_on_rank_one", train={"rank_timeout": TIMEOUT})
    ranks = Ranked(2, tmp_path / "logs", command, "train", *map(str, started(file, run)))
    ranks.processes[0].join(300)
    first, second = ranks.end(0)
    assert first.status == 2
    assert second.status is None
    assert "rank 1 did not come to the rollout in" in first.said
    assert f"train.rank_timeout = {TIMEOUT} s" in first.said
    assert f"the last checkpoint is step-000002; go on with: longgrpo train --resume {run}" in first.said


@pytest.mark.parametrize("function", ["dies_slowly", "dies_in_the_reward", "dies_in_the_backward", "dies_in_the_save"])
@pytest.mark.parametrize("victim", ["0", "1"])
def test_a_rank_that_dies_is_named_and_the_run_goes_on_from_its_checkpoint(config, run, tmp_path, function, victim):
    if function == "dies_in_the_save" and victim == "1":
        pytest.skip("rank 0 writes")
    file = config(function)
    ended = train(tmp_path, *started(file, run), VICTIM=victim)
    assert ended[int(victim)].status == -signal.SIGKILL
    other = ended[1 - int(victim)]
    assert other.status == 2
    assert f"rank {victim} has died" in other.said
    assert saved(run)[-1] == 2
    ended = train(tmp_path, "--resume", run, VICTIM="none")
    assert [one.status for one in ended] == [0, 0], ended[0].said
    assert saved(run)[-1] == 4


@pytest.mark.parametrize("heard", [[0], [1], [0, 1]])
def test_a_signal_to_any_rank_stops_all_after_the_step(config, run, tmp_path, heard):
    ended = train(tmp_path, *started(config("stops"), run), HEARD=",".join(map(str, heard)))
    assert [one.status for one in ended] == [128 + signal.SIGTERM] * 2
    assert "saved at step 2; go on with" in ended[0].said
    assert saved(run)[-1] == 2
    assert [one.status for one in train(tmp_path, "--resume", run)] == [0, 0]


def limited(room, *arguments):
    with limited_file_size(room if os.environ["RANK"] == "0" else 1 << 40):
        return command(*arguments)


def test_a_disk_of_rank_0_that_is_full_ends_all(config, run, tmp_path):
    file = config(train={"steps": 2})
    assert [one.status for one in train(tmp_path, *started(file, run))] == [0, 0]
    ended = run_ranks(2, tmp_path / "logs", limited, 3000, "train", "--resume", str(run), "--train.steps", "6")
    assert [one.status for one in ended] == [2, 2]
    assert "cannot be written" in ended[0].said
    assert saved(run)[-1] == 2
    ended = train(tmp_path, "--resume", run, "--train.steps", "6")
    assert [one.status for one in ended] == [0, 0], ended[0].said


def test_fewer_prompts_than_ranks_are_refused(config, run, tmp_path):
    ended = train(tmp_path, *started(config(train={"prompts_per_step": 1}), run))
    assert [one.status for one in ended] == [2, 2]
    assert ended[0].said.count("train.prompts_per_step = 1, and there are 2 ranks") == 1
    assert "prompts_per_step" not in ended[1].said
    assert not run.exists()


def test_ranks_that_draw_other_prompts_are_told_so(config, run, tmp_path):
    file = config(
        task={
            "name": f"{OWN_REWARDS.with_name('own_data.py')}:thirty",
            "sampler": f"{RANKED_REWARDS}:Apart",
            "parameters": {},
        }
    )
    ended = train(tmp_path, *started(file, run))
    assert [one.status for one in ended] == [2, 2]
    assert "rank 1 drew other prompts than rank 0" in ended[0].said


@pytest.mark.parametrize("function", ["one_group", "odd_groups"])
def test_a_rank_without_a_sample_to_train_on_takes_part(config, run, tmp_path, function):
    """one_group: only one group of four has spread: the other rank has no micro-batch. odd_groups: a rank's rollout has
    none, and it trains on the other's."""
    ended = train(tmp_path, *started(config(function), run))
    assert [one.status for one in ended] == [0, 0], ended[0].said


def different(*arguments):
    """Another number of threads and other seeds on each rank."""
    import torch

    rank = int(os.environ["RANK"])
    torch.set_num_threads(1 + rank)
    random.seed(rank)
    torch.manual_seed(rank)
    return command(*arguments)


def test_ranks_in_different_environments_stay_equal(config, run, tmp_path):
    """Every save compares the weights of the ranks, bit for bit."""
    file = config(train={"save_steps": 1})
    ended = run_ranks(2, tmp_path / "logs", different, "train", *map(str, started(file, run)))
    assert [one.status for one in ended] == [0, 0], ended[0].said


def test_weights_that_differ_between_ranks_are_found(config, run, tmp_path):
    ended = train(tmp_path, *started(config("changes_a_weight"), run))
    assert [one.status for one in ended] == [2, 2]
    assert "rank 1 has other weights than rank 0 (1 of " in ended[0].said


@pytest.mark.parametrize("lora", [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_run_goes_on_on_any_number_of_ranks(config, run, tmp_path, lora):
    """Two steps on one rank and two on two, or the other way round, give what four on two do, but for rounding."""
    file = config(**({} if lora else {"lora": None}))
    whole = tmp_path / "whole"
    assert [one.status for one in train(tmp_path, *started(file, whole))] == [0, 0]
    for first, second in ((1, 2), (2, 1), (2, 2)):
        part = tmp_path / f"{first}-{second}"
        for world, steps, begin in ((first, "2", started(file, part)), (second, "4", ["--resume", part])):
            ended = train(tmp_path, *begin, "--train.steps", steps, world=world)
            assert [one.status for one in ended] == [0] * world, ended[0].said
        found = apart(whole, part) if (first, second) == (2, 2) else positions(whole, part)
        assert found == []


def apart(whole, part):
    """What differs in any bit, but for output_dir in the config."""
    return [name for name in differences(whole, part) if name != "config.yaml"]


def positions(whole, part):
    """Where the stream of two runs' last checkpoints differs, and where weights and moments do beyond rounding."""
    import torch

    one, two = (checkpoint.find(run, "last") for run in (whole, part))
    states = [checkpoint.read_state(path) for path in (one, two)]
    odd = [key for key in ("stream", "step") if states[0][key] != states[1][key]]
    tensors = [checkpoint.read_tensors(path) for path in (one, two)]
    close = functools.partial(torch.allclose, rtol=1e-3, atol=1e-4)
    return odd + [name for name in tensors[0] if not close(tensors[0][name], tensors[1][name])]


def by_torchrun(*arguments):
    """What a user types; neither a rank of this test's nor its threads are around."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    paths = [str(ROOT / "tests"), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)  # the rewards import what the tests have
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)], stderr=subprocess.PIPE, text=True, env=environment
    )


def test_the_command_ends_as_one_rank_would(config, run):
    command = by_torchrun("longgrpo", "train", *started(config("raises_on_rank_one"), run), "--ranks", "2")
    _, said = command.communicate(timeout=300)
    assert command.returncode == 2
    assert said.count("rank 1: reward function raises_on_rank_one raised KeyError") == 1
    assert "saved at step 2" in said
    assert "Traceback" not in said
    assert "elastic" not in said


@pytest.mark.long
def test_a_signal_to_the_command_saves_and_has_its_status(config, run):
    file = config(train={"steps": 100_000, "save_steps": 0})
    command = by_torchrun("longgrpo", "train", *started(file, run), "--ranks", "2")
    metrics = run / "metrics.jsonl"
    while command.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.1)
    command.send_signal(signal.SIGTERM)
    _, said = command.communicate(timeout=300)
    assert command.returncode == 128 + signal.SIGTERM, said
    assert "; go on with: longgrpo train --resume" in said
    assert len(saved(run)) == 1


@pytest.mark.long
def test_two_machines(config, run, tmp_path):
    """Two agents on loopback, of a rank each, are two ranks of one."""
    file = config(train={"save_steps": 1})
    assert [one.status for one in train(tmp_path, *started(file, tmp_path / "one"))] == [0, 0]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}", "--rdzv-id", "mine"]
    agents = [
        by_torchrun(
            "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *meeting, "-m", "longgrpo", "train",
            *started(file, run),
        )
        for _ in range(2)
    ]  # fmt: skip
    said = [agent.communicate(timeout=300)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert apart(tmp_path / "one", run) == []


@pytest.mark.long
@pytest.mark.parametrize("lora", [True, False])
def test_killed_at_any_moment_and_resumed_it_is_the_same_run(config, tmp_path, lora):
    file = config(**({} if lora else {"lora": None}), train={"steps": 6})
    before = time.monotonic()
    assert [one.status for one in train(tmp_path, *started(file, tmp_path / "whole"))] == [0, 0]
    seconds = time.monotonic() - before
    draw, killed = random.Random(f"{lora}"), 0
    for number in range(5):
        run, victim = tmp_path / str(number), draw.randrange(2)
        ranks = Ranked(2, tmp_path / "logs", command, "train", *map(str, started(file, run)))
        ranks.processes[victim].join(draw.uniform(0.3, 1) * seconds)
        ranks.processes[victim].kill()
        ended = ranks.end()
        killed += ended[victim].status == -signal.SIGKILL
        again = ["--resume", run] if (run / "config.yaml").exists() else started(file, run)
        ended = train(tmp_path, *again)
        assert [one.status for one in ended] == [0, 0], ended[0].said
        assert apart(tmp_path / "whole", run) == []
    assert killed >= 3
