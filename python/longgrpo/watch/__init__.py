"""What ails a run, read off the metrics of its steps: a table of findings (longgrpo.config.watch lists them), and the
watch that says when each begins and ends. It needs no torch."""

from longgrpo.watch.history import Facts, History
from longgrpo.watch.watch import Event, Watch

__all__ = ["Event", "Facts", "History", "Watch"]
