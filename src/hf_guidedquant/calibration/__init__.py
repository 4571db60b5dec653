"""From data to Hessians: token rows, and the one pass over the model that turns them into statistics per layer."""

from .collector import LayerStatistics, collect, window_memory
from .rows import Calibration, load_rows

__all__ = ["Calibration", "LayerStatistics", "collect", "load_rows", "window_memory"]
