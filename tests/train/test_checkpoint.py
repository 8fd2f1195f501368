import random

import numpy
import pytest
import torch

from longgrpo.train import checkpoint
from longgrpo.train.errors import UserError


def training(seed):
    torch.manual_seed(seed)
    parameters = {"a": torch.nn.Parameter(torch.randn(3, 2)), "b": torch.nn.Parameter(torch.randn(4))}
    return parameters, torch.optim.AdamW(parameters.values(), lr=0.1, betas=(0.9, 0.99))


def advance(parameters, optimizer):
    for i, parameter in enumerate(parameters.values()):
        parameter.grad = torch.cos(parameter.detach() * (i + 1))
    optimizer.step()


def save(run, step, parameters, optimizer, keep=2, **state):
    return checkpoint.save(run, step, parameters, optimizer, state, None, keep)


def test_training_goes_on_bit_for_bit(tmp_path):
    parameters, optimizer = training(0)
    advance(parameters, optimizer)
    save(tmp_path, 1, parameters, optimizer, position=7)
    advance(parameters, optimizer)

    others, other_optimizer = training(1)
    state = checkpoint.load(tmp_path, others, other_optimizer)
    advance(others, other_optimizer)
    assert state == {"step": 1, "position": 7}
    assert all(torch.equal(others[name], parameters[name]) for name in parameters)


def test_before_the_first_step_there_are_no_moments(tmp_path):
    parameters, optimizer = training(0)
    save(tmp_path, 0, parameters, optimizer)
    others, other_optimizer = training(1)
    checkpoint.load(tmp_path, others, other_optimizer)
    assert torch.equal(others["a"], parameters["a"])
    assert not other_optimizer.state


def test_the_newest_are_kept(tmp_path):
    parameters, optimizer = training(0)
    for step in (1, 2, 10):
        save(tmp_path, step, parameters, optimizer)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-000002", "step-000010"]


def test_a_failed_save_leaves_what_was_saved(tmp_path):
    parameters, optimizer = training(0)
    save(tmp_path, 1, parameters, optimizer)

    def full_disk(directory):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, 2, parameters, optimizer, {}, full_disk, 1)
    checkpoint.save(tmp_path, 1, parameters, optimizer, {}, full_disk, 1)  # that step is saved: nothing is written
    others, other_optimizer = training(1)
    assert checkpoint.load(tmp_path, others, other_optimizer) == {"step": 1}
    assert torch.equal(others["a"], parameters["a"])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


def test_what_a_killed_save_left_is_no_checkpoint(tmp_path):
    parameters, optimizer = training(0)
    save(tmp_path, 1, parameters, optimizer)
    (tmp_path / "checkpoints" / ".step-000002.tmp").mkdir()
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-000001"]
    save(tmp_path, 2, parameters, optimizer)
    assert checkpoint.load(tmp_path, *training(1))["step"] == 2


def test_other_weights_are_refused(tmp_path):
    parameters, optimizer = training(0)
    save(tmp_path, 1, parameters, optimizer)
    del parameters["b"]
    with pytest.raises(UserError, match="first difference: b"):
        checkpoint.load(tmp_path, parameters, optimizer)
    wider = {"a": torch.nn.Parameter(torch.zeros(3, 5)), "b": torch.nn.Parameter(torch.zeros(4))}
    with pytest.raises(UserError, match=r"a was saved as \[3, 2\], now \[3, 5\]"):
        checkpoint.load(tmp_path, wider, torch.optim.AdamW(wider.values()))
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.load(tmp_path / "absent", parameters, optimizer)


def test_random_generators_go_on():
    states = checkpoint.generator_states()
    drawn = [random.random(), numpy.random.rand(), torch.rand(()).item()]
    checkpoint.set_generator_states(states)
    assert [random.random(), numpy.random.rand(), torch.rand(()).item()] == drawn
