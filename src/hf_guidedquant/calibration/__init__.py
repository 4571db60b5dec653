"""From data to Hessians: token rows, and the one pass over the model that turns them into statistics per layer."""

from .collector import LayerStatistics, collect
from .passes import gather, windows
from .rows import Calibration, load_rows

__all__ = ["Calibration", "LayerStatistics", "collect", "gather", "load_rows", "windows"]
