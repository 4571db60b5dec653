"""From data to Hessians: token rows, and the pass over the model that turns them into statistics per layer."""

from .collector import LayerStatistics
from .outline import Outline, outline
from .passage import Passage, Shelf
from .relay import Relay
from .routing import lend, with_fellows
from .rows import Calibration, load_rows
from .segments import Footprint, Segment, divide, gather, outline_for, place_for, relay_for
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
    "gather",
    "lend",
    "load_rows",
    "open_statistics",
    "outline",
    "outline_for",
    "place_for",
    "relay_for",
    "with_fellows",
]
