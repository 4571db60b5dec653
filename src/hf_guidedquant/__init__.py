"""2-4 bit language models for Hugging Face Transformers, every weight rounded by what it does to the end loss.

Importing this package registers the method, so that ``from_pretrained`` can quantize with :class:`GuidedQuantConfig`
and load what was quantized with it.
"""

import logging as _logging
import sys as _sys
from typing import TYPE_CHECKING as _TYPE_CHECKING

# `python -m hf_guidedquant` comes by here on its way to the command line, whose help should not wait for torch. As long
# as it does, argv[0] is "-m"; a command that needs the package loads this file again.
_ON_THE_WAY = _sys.argv[:1] == ["-m"] and _sys.orig_argv[-len(_sys.argv)] == __name__

if _TYPE_CHECKING or not _ON_THE_WAY:
    from . import errors, evaluate, page, pictures
    from .checkpoint import save
    from .config import GuidedQuantConfig
    from .decoding import GraphedDecode, graphed_decode
    from .forecast import plan
    from .importer import convert
    from .nn import GuidedLinear, cache_dequantized, fuse, unfuse
    from .quantizer import GuidedQuantizer, quantize, register
    from .triton_kernels import set_backend

    register()

__version__ = "0.1.0"
__all__ = [
    "GraphedDecode",
    "GuidedLinear",
    "GuidedQuantConfig",
    "GuidedQuantizer",
    "cache_dequantized",
    "convert",
    "errors",
    "evaluate",
    "fuse",
    "graphed_decode",
    "page",
    "pictures",
    "plan",
    "quantize",
    "register",
    "save",
    "set_backend",
    "unfuse",
]


class _Handler(_logging.StreamHandler):
    """Shows messages as long as the application has not set up logging of its own."""

    def emit(self, record: _logging.LogRecord) -> None:
        if not _logging.getLogger().handlers:
            super().emit(record)


def _show_messages() -> None:
    """Show what a run does (rows kept, the summary) to users who never configured a logger."""
    logger = _logging.getLogger(__name__)
    if logger.level == _logging.NOTSET and not logger.handlers:
        handler = _Handler()
        handler.setFormatter(_logging.Formatter("[guidedquant] %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(_logging.INFO)


_show_messages()
