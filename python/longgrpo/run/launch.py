"""`longgrpo train --ranks N`: torchrun starts the ranks on this machine. By hand, and on several machines:

torchrun --nproc-per-node 8 --virtual-local-rank --shutdown-timeout 600 -m longgrpo train CONFIG.yaml
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any

from longgrpo.errors import ConfigError, UserError

SHUTDOWN = 600  # seconds that the ranks have after a signal, to end their step and to save


def launch(ranks: int, arguments: Sequence[str]) -> int:
    """Runs `longgrpo` with these arguments on as many ranks; returns the exit status that one rank would have."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks tell what happens
    if ranks < 1:
        raise ConfigError(f"--ranks {ranks}: must be at least 1")
    if "RANK" in os.environ:
        raise ConfigError("--ranks starts torchrun, and this process is a rank of one already: leave it out")
    options = ["--standalone", "--nproc-per-node", str(ranks), "--virtual-local-rank", "--shutdown-timeout"]
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of a rank that is gone its own error tells
    # Each rank would otherwise take all cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    try:
        run.run(run.parse_args([*options, str(SHUTDOWN), "-m", "longgrpo", *arguments]))
    except ChildFailedError as failed:
        return _status(failed.failures)
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    return 0


def _status(failures: Mapping[int, Any]) -> int:
    """Of the rank that failed first, if none was killed: the others are stopped then."""
    killed = {rank: -failure.exitcode for rank, failure in failures.items() if failure.exitcode < 0}
    ended = [failure for failure in failures.values() if failure.exitcode > 0]
    for rank, number in killed.items():
        if not (ended and number == signal.SIGTERM):
            raise UserError(
                f"rank {rank} was killed by {signal.Signals(number).name}; go on from the last checkpoint with "
                "longgrpo train --resume RUN"
            )
    return int(min(ended, key=lambda failure: failure.timestamp).exitcode) if ended else 1


def without_ranks(arguments: Sequence[str]) -> list[str]:
    """The command line of a rank."""
    rest, remaining = [], iter(arguments)
    for argument in remaining:
        if argument == "--ranks":
            next(remaining, None)
        elif not argument.startswith("--ranks="):
            rest.append(argument)
    return rest
