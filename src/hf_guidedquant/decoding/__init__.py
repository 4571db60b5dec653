"""A decode loop whose step is one CUDA graph: ``model.generate(..., custom_generate=graphed_decode)``.

It works for any decoder-only Transformers model, quantized or not, and knows nothing of this package's layers.
"""

from .loop import GraphedDecode

graphed_decode = GraphedDecode()

__all__ = ["GraphedDecode", "graphed_decode"]
