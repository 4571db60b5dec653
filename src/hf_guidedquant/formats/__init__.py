"""How codes are laid out as named tensors. A format declares names, shapes and dtypes without holding data."""

from . import lut

FORMATS = {"lut": lut}

__all__ = ["FORMATS", "lut"]
