"""From data to Hessians: token rows, and the pass over the model that turns them into statistics per layer."""

from .collector import LayerStatistics
from .footprint import Footprint
from .outline import Outline, outline
from .passage import Passage, Shelf, shelved
from .relay import Relay, waiting
from .routing import lend, with_fellows
from .rows import Calibration, load_rows
from .segments import Segment, divide, fit_at_once, gather, outline_for, place_for, relay_for
from .store import StatisticsStore, open_statistics

__all__ = [
    "Calibration",
    "Footprint",
    "LayerStatistics",
    "Outline",
    "Passage",
    "Relay",
    "Segment",
    "Shelf",
    "StatisticsStore",
    "divide",
    "fit_at_once",
    "gather",
    "lend",
    "load_rows",
    "open_statistics",
    "outline",
    "outline_for",
    "place_for",
    "relay_for",
    "shelved",
    "waiting",
    "with_fellows",
]
