"""What a model is worth: perplexity, distance to the original, speed of decoding, accuracy on tasks."""

from .measurement import Measurement, bits_per_weight, comparison_table
from .speed import DecodeSpeed, decode_speed
from .tasks import TASKS, check_tasks, run_tasks
from .text import Comparison, compare, perplexity, token_ids

__all__ = [
    "TASKS",
    "Comparison",
    "DecodeSpeed",
    "Measurement",
    "bits_per_weight",
    "check_tasks",
    "compare",
    "comparison_table",
    "decode_speed",
    "perplexity",
    "run_tasks",
    "token_ids",
]
