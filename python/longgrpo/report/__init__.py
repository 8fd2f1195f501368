"""What runs have left on disk, as one HTML page: `longgrpo report RUN [RUN ...]`."""

from longgrpo.report.live import follow
from longgrpo.report.page import write_report
from longgrpo.report.run import Run, read_run

__all__ = ["Run", "follow", "read_run", "write_report"]
