"""2-4 bit language models for Hugging Face Transformers, every weight rounded by what it does to the end loss.

Importing this package registers the method, so that ``from_pretrained`` can quantize with :class:`GuidedQuantConfig`
and load what was quantized with it.
"""

import logging as _logging

from . import errors, evaluate
from .checkpoint import save
from .config import GuidedQuantConfig
from .nn import GuidedLinear, cache_dequantized
from .plan import plan
from .quantizer import GuidedQuantizer, quantize, register

__version__ = "0.1.0"
__all__ = [
    "GuidedLinear",
    "GuidedQuantConfig",
    "GuidedQuantizer",
    "cache_dequantized",
    "errors",
    "evaluate",
    "plan",
    "quantize",
    "register",
    "save",
]

register()


def _show_progress_messages() -> None:
    """Show what a run does (rows kept, the summary) unless the application has set up logging of its own."""
    logger = _logging.getLogger(__name__)
    if logger.level == _logging.NOTSET and not logger.handlers and not _logging.getLogger().handlers:
        handler = _logging.StreamHandler()
        handler.setFormatter(_logging.Formatter("[guidedquant] %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(_logging.INFO)
        logger.propagate = False


_show_progress_messages()
