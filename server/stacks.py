"""Where a thread stands, for the log."""

import sys
import traceback
from pathlib import Path

FRAMES = 12  # innermost first


def place_of(thread: int | None) -> str:
    """Where a thread is, by functions and lines; no values."""
    frame = sys._current_frames().get(thread or 0)
    if frame is None:
        return "ended"
    frames = traceback.extract_stack(frame)[: -FRAMES - 1 : -1]
    return " < ".join(f"{each.name} ({Path(each.filename).name}:{each.lineno})" for each in frames)
