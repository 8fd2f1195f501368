"""A report that is written again and again while its runs go on."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from longgrpo.errors import DataError
from longgrpo.report.page import write_report
from longgrpo.report.run import Run, read_run

log = logging.getLogger(__name__)


def follow(directories: Sequence[Path], path: Path, seconds: float) -> None:
    """Writes the report every `seconds` until all runs have ended, or the user stops it. An open page loads itself
    again as often, until the last one is written. Raises DataError for a directory without a run."""
    if not seconds > 0:
        raise DataError(f"--refresh {seconds:g}: takes seconds, more than 0")
    runs = _read(directories, wait=seconds)
    try:
        while not all(run.summary for run in runs):
            write_report(runs, path, refresh=seconds)
            time.sleep(seconds)
            runs = _read(directories, wait=seconds)
    except KeyboardInterrupt:
        log.info("no longer refreshed")
    write_report(runs, path)


def _read(directories: Sequence[Path], wait: float) -> list[Run]:
    """The runs, as soon as each has a step."""
    while True:
        try:
            return [read_run(directory) for directory in directories]
        except DataError as error:
            if not all((directory / "config.yaml").is_file() for directory in directories):
                raise
            log.warning("%s", error)
            time.sleep(wait)
