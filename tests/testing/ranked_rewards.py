"""Reward functions, and a sampler, that are not alike on all ranks."""

import contextlib
import os
import signal
import socket
import time

from longgrpo.tasks.data import Shuffled
from testing.own_rewards import digits

RANK = int(os.environ.get("RANK", "0"))
STEP = 2  # steps that are done when something happens


def _now(trainer_state, rank=1):
    return trainer_state.global_step == STEP and rank == RANK


def raises_on_rank_one(completions, trainer_state, **columns):
    if _now(trainer_state):
        raise KeyError("no such column")
    return digits(completions)


def raises_everywhere(completions, trainer_state, **columns):
    if trainer_state.global_step == STEP:
        raise KeyError("no such column")
    return digits(completions)


def hangs_on_rank_one(completions, trainer_state, **columns):
    if _now(trainer_state):
        time.sleep(600)
    return digits(completions)


def _at(module, name, act):
    """The next call of the function acts first."""
    present = getattr(module, name)

    def planted(*arguments, **named):
        setattr(module, name, present)
        act()
        return present(*arguments, **named)

    setattr(module, name, planted)


def _raise():
    raise RuntimeError("planted")


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _die_slowly():
    """As one that has much memory to give back."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as one:
            one.getpeername()  # which a listening one has not; gloo aborts without that
            one.shutdown(socket.SHUT_RDWR)
    time.sleep(1)
    _die()


def breaks_the_backward(completions, trainer_state, **columns):
    from longgrpo.train import loop

    if _now(trainer_state):
        _at(loop, "_accumulate", _raise)
    return digits(completions)


def breaks_amid_the_backward(completions, trainer_state, **columns):
    """Where the other rank waits for a gradient."""
    from longgrpo.train.shards import GradientShards

    if _now(trainer_state):
        _at(GradientShards, "_add_next", _raise)
    return digits(completions)


def _victim(trainer_state):
    return os.environ.get("VICTIM", "none") == str(RANK) and trainer_state.global_step == STEP


def dies_in_the_reward(completions, trainer_state, **columns):
    if _victim(trainer_state):
        _die()
    return digits(completions)


def dies_in_the_backward(completions, trainer_state, **columns):
    from longgrpo.train import loop

    if _victim(trainer_state):
        _at(loop, "_accumulate", _die)
    return digits(completions)


def dies_slowly(completions, trainer_state, **columns):
    if _victim(trainer_state):
        _die_slowly()
    return digits(completions)


def dies_in_the_save(completions, trainer_state, **columns):
    from longgrpo.run import checkpoint

    if _victim(trainer_state):
        _at(checkpoint, "save_file", _die)
    return digits(completions)


def stops(completions, trainer_state, **columns):
    """In step 2 the ranks of HEARD are asked to stop, one after the other."""
    if str(RANK) in os.environ.get("HEARD", "").split(",") and trainer_state.global_step == 1:
        time.sleep(0.2 * RANK)
        os.kill(os.getpid(), signal.SIGTERM)
    return digits(completions)


def one_group(completions, question, **columns):
    """Of the groups of a rank only the first of rank 0 has spread."""
    return [float(i == 0 and RANK == 0) for i in range(len(completions))]


def odd_groups(completions, **columns):
    """Only rank 1's rollout has spread."""
    return [value if RANK == 1 else 0.1 for value in digits(completions)]


def changes_a_weight(completions, trainer_state, **columns):
    """One bit of one weight of rank 1."""
    import gc

    import torch

    from longgrpo.train.state import TrainState

    if _now(trainer_state):
        (state,) = (one for one in gc.get_objects() if isinstance(one, TrainState))
        weight = next(iter(state.trained.values()))
        with torch.no_grad():
            weight.view(-1)[0] += 1e-3
    return digits(completions)


class Apart(Shuffled):
    """Draws by its rank, which it must not."""

    def index(self, position):
        return super().index(position + RANK * 7)
