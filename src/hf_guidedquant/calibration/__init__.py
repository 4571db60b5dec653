"""From data to Hessians: token rows, and the one pass over the model that turns them into statistics per layer."""

from .collector import LayerStatistics, collect
from .passes import divided, gather, windows
from .rows import Calibration, load_rows
from .store import StatisticsStore, open_statistics

__all__ = [
    "Calibration",
    "LayerStatistics",
    "StatisticsStore",
    "collect",
    "divided",
    "gather",
    "load_rows",
    "open_statistics",
    "windows",
]
