"""The warnings, logs and bars of other packages, which the command line shows only with --verbose."""

from __future__ import annotations

import io
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from longgrpo.visible import listening, visible

SETTINGS = {"TRANSFORMERS_VERBOSITY": "error", "VLLM_LOGGING_LEVEL": "ERROR", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
LOGGERS = ("torch", "torch._library", "torch.utils", "transformers", "datasets", "peft", "accelerate", "vllm")
OURS = r"(tiled_mlp|offload): "
"""What the warnings of this package begin with."""


class _Handler(logging.Handler):
    """Writes to whatever stderr is at the moment: a bar that is drawn there makes room."""

    def emit(self, record: logging.LogRecord) -> None:
        with listening():
            print(visible(self.format(record)), file=sys.stderr, flush=True)


class Heard(io.TextIOBase):
    """stderr, whose reader may go (`| head` has ended, a connection is closed): then it is written to no more, also by
    the libraries that show a bar, and the run goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with listening():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with listening():
            self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding


def log_to_stderr(verbose: bool, rank: int = 0) -> None:
    """Our own lines, and of other packages errors, or everything if it is asked for. Of several ranks all but the first
    log warnings only."""
    handler = _Handler()
    handler.setFormatter(logging.Formatter(f"rank {rank}: %(message)s" if rank else "%(message)s"))
    if not verbose:
        handler.addFilter(lambda record: record.name.startswith("longgrpo") or record.levelno >= logging.ERROR)
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("longgrpo").setLevel(logging.WARNING if rank else logging.INFO)
    if not verbose:
        _hush()


def _hush() -> None:
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", message=OURS)
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def native_output_aside() -> Iterator[None]:
    """What libraries write past Python to stderr, or to the stderr that they began with, is shown only if the block
    fails."""
    before = sys.stderr
    before.flush()
    terminal = os.dup(2)
    # Left open: a logger that is made in the block goes on writing there.
    sys.stderr = Heard(os.fdopen(terminal, "w", buffering=1, encoding=before.encoding, errors="backslashreplace"))
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            kept.seek(0)
            with os.fdopen(os.dup(terminal), "wb") as shown:
                shutil.copyfileobj(kept, shown)
            raise
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            sys.stderr = before
