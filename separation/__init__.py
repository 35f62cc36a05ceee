"""Separate songs into stems: `separate(song, checkpoint)` or `python -m separation.separate`."""

from separation.separator import Separator, separate

__all__ = ["Separator", "separate"]
