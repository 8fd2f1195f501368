import itertools
import math
import os
import random
import signal
import sys
from pathlib import Path

import numpy
import pytest
import torch

from longgrpo.errors import ConfigError, UserError
from longgrpo.run import checkpoint, files
from longgrpo.train.generators import random_states, seed_everything, set_random_states
from longgrpo.train.metrics import best_metric
from testing.full_disk import limited_file_size


def training(seed):
    torch.manual_seed(seed)
    parameters = {"a": torch.nn.Parameter(torch.randn(3, 2)), "b": torch.nn.Parameter(torch.randn(4))}
    return parameters, torch.optim.AdamW(parameters.values(), lr=0.1, betas=(0.9, 0.99))


def advance(parameters, optimizer):
    for i, parameter in enumerate(parameters.values()):
        parameter.grad = torch.cos(parameter.detach() * (i + 1))
    optimizer.step()


def save(run, step, parameters, optimizer, keep=2, metric=None, **state):
    return checkpoint.save(run, step, parameters, optimizer, state, None, keep, metric)


def load(run, parameters, optimizer):
    return checkpoint.load(checkpoint.checkpoints(run)[-1], parameters, optimizer)


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_training_goes_on_bit_for_bit(tmp_path):
    parameters, optimizer = training(0)
    advance(parameters, optimizer)
    save(tmp_path, 1, parameters, optimizer, position=7)
    advance(parameters, optimizer)

    others, other_optimizer = training(1)
    state = load(tmp_path, others, other_optimizer)
    advance(others, other_optimizer)
    assert state == {"step": 1, "metric": None, "position": 7}
    assert all(torch.equal(others[name], parameters[name]) for name in parameters)


def test_before_the_first_step_there_are_no_moments(tmp_path):
    parameters, optimizer = training(0)
    save(tmp_path, 0, parameters, optimizer)
    others, other_optimizer = training(1)
    load(tmp_path, others, other_optimizer)
    assert torch.equal(others["a"], parameters["a"])
    assert not other_optimizer.state


def test_the_newest_are_kept(tmp_path):
    parameters, optimizer = training(0)
    for step in (1, 2, 10, 1_000_000):
        save(tmp_path, step, parameters, optimizer)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-000010", "step-1000000"]


def test_the_best_is_kept_besides_the_newest(tmp_path):
    parameters, optimizer = training(0)
    for step, metric in enumerate([0.1, 0.7, None, 0.7, 0.2, 0.3], 1):
        save(tmp_path, step, parameters, optimizer, metric=metric)
    assert names(tmp_path) == ["step-000002", "step-000005", "step-000006"]
    assert checkpoint.best(tmp_path).name == "step-000002"
    save(tmp_path, 7, parameters, optimizer, metric=0.9)
    assert names(tmp_path) == ["step-000006", "step-000007"]


def killed_before(operation, work):
    """Runs work() in a process of its own that is killed before its n-th operation on files; False: it has fewer."""
    child = os.fork()
    if child == 0:
        counter = itertools.count()

        def hook(event, arguments):
            if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.scandir") and (
                next(counter) == operation
            ):
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        work()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
    return status != 0


def test_a_save_killed_at_any_operation_leaves_a_whole_checkpoint(tmp_path):
    for operation in itertools.count():
        run = tmp_path / str(operation)
        parameters, optimizer = training(0)
        weights = {}
        for step in (1, 2, 3):
            advance(parameters, optimizer)
            weights[step] = parameters["a"].detach().clone()
            if step < 3:
                save(run, step, parameters, optimizer, metric=-step)
        killed = killed_before(
            operation, lambda run=run, p=parameters, o=optimizer: save(run, 3, p, o, keep=1, metric=-3)
        )
        others, other_optimizer = training(1)
        step = load(run, others, other_optimizer)["step"]
        assert step in (2, 3) if killed else step == 3
        assert torch.equal(others["a"], weights[step])
        save(run, 3, parameters, optimizer, keep=1, metric=-3)  # what the run does when it is resumed
        assert names(run) == ["step-000001", "step-000003"]
        if not killed:
            break
    assert operation > 10


def test_a_directory_replaced_and_killed_at_any_operation_is_never_lost(tmp_path):
    def write(text):
        return lambda directory: (directory / "file").write_text(text)

    for operation in itertools.count():
        directory = tmp_path / str(operation) / "adapter"
        files.replace_directory(directory, write("old"))
        killed = killed_before(operation, lambda d=directory: files.replace_directory(d, write("new")))
        with limited_file_size(0), pytest.raises(UserError):  # the disk is full when it is tried again
            files.replace_directory(directory, write("newest"))
        assert (directory / "file").read_text() in ("old", "new")
        if not killed:
            break
    assert operation > 3


@pytest.mark.parametrize("size", [0, 100, 300])
def test_a_full_disk_leaves_what_was_saved(tmp_path, size):
    parameters, optimizer = training(0)
    save(tmp_path, 1, parameters, optimizer)
    weight = parameters["a"].detach().clone()
    advance(parameters, optimizer)
    with limited_file_size(size), pytest.raises(UserError, match=r"step-000002: cannot be written .*make room"):
        save(tmp_path, 2, parameters, optimizer, keep=1)
    assert names(tmp_path) == ["step-000001"]
    others, other_optimizer = training(1)
    assert load(tmp_path, others, other_optimizer)["step"] == 1
    assert torch.equal(others["a"], weight)
    save(tmp_path, 2, parameters, optimizer, keep=1)
    assert names(tmp_path) == ["step-000002"]


def test_a_file_on_a_full_disk_keeps_its_content(tmp_path):
    files.write_file(tmp_path / "file", "old")
    with limited_file_size(2), pytest.raises(UserError, match="file: cannot be written"):
        files.write_file(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_step_is_saved_once(tmp_path):
    parameters, optimizer = training(0)
    save(tmp_path, 1, parameters, optimizer)
    with limited_file_size(0):
        save(tmp_path, 1, parameters, optimizer)


def test_a_checkpoint_that_was_cut_off_is_named(tmp_path):
    parameters, optimizer = training(0)
    path = save(tmp_path, 1, parameters, optimizer) / "state.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(UserError, match=r"step-000001: cannot be read.*the checkpoint before it"):
        load(tmp_path, parameters, optimizer)


def test_other_weights_are_refused(tmp_path):
    parameters, optimizer = training(0)
    save(tmp_path, 1, parameters, optimizer)
    del parameters["b"]
    with pytest.raises(UserError, match="first difference: b"):
        load(tmp_path, parameters, optimizer)
    wider = {"a": torch.nn.Parameter(torch.zeros(3, 5)), "b": torch.nn.Parameter(torch.zeros(4))}
    with pytest.raises(UserError, match=r"a was saved as \[3, 2\], now \[3, 5\]"):
        load(tmp_path, wider, torch.optim.AdamW(wider.values()))


def test_random_generators_go_on():
    states = random_states()
    drawn = [random.random(), numpy.random.rand(), torch.rand(()).item()]
    set_random_states(states)
    assert [random.random(), numpy.random.rand(), torch.rand(()).item()] == drawn


def test_generators_seeded_alike_draw_alike():
    drawn = []
    for _ in range(2):
        seed_everything(2**40 + 7)
        drawn.append([random.random(), numpy.random.rand(), torch.rand(()).item()])
    assert drawn[0] == drawn[1]


def test_the_metric_that_chooses_the_best():
    metrics = {"reward/mean": 0.5, "kl": math.nan, "grad_norm": None}
    assert best_metric(None, metrics) is None
    assert best_metric("reward/mean", metrics) == 0.5
    assert best_metric("-reward/mean", metrics) == -0.5
    assert best_metric("kl", metrics) is None
    assert best_metric("grad_norm", metrics) is None
    with pytest.raises(ConfigError, match=r"best_metric = '-reward/mena'.*did you mean reward/mean"):
        best_metric("-reward/mena", metrics)


def test_a_run_may_be_named_from_beside_it(tmp_path, monkeypatch):
    save(tmp_path / "runs" / "own", 1, *training(0))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    found = checkpoint.find(Path("../runs/own"), "last")
    checkpoint.verify(found)
    sums = found / checkpoint.SUMS
    sums.write_text(sums.read_text() + f"{'0' * 64}  ../../outside\n")
    with pytest.raises(UserError, match=r"\.\./\.\./outside is missing"):
        checkpoint.verify(found)
