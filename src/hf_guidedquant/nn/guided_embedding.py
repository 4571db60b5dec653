"""Embeddings whose rows are codes and a codebook each."""

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..triton_kernels import unpack_codes, unpack_tile_rows
from .guided_linear import GuidedLinear


class GuidedEmbedding(GuidedLinear):
    """Drop-in for ``nn.Embedding``: ``y = scale * W[ids]`` with ``W[v, k] = lut[v, code[v, k]]``.

    A :class:`GuidedLinear` without bias, of which rows are looked up instead of multiplied: only the rows that are
    asked for are ever dense. Without a head that is tied to it, it holds bit-planes on every device.

    Args:
        num_embeddings, embedding_dim: As of ``nn.Embedding``; any sizes.
        bits: Bits per weight, 1-8.
        padding_idx: As of ``nn.Embedding``, for whoever asks; that row is one like any other.
        lut_dtype: Storage dtype of the codebook. It stays what it is when the module is cast to another dtype.
        dtype: Of ``scale``, and of what is looked up.
        device: Where to allocate; ``"meta"`` for a module that is about to be loaded.

    The state dict holds ``weight`` and ``lut`` as of :class:`GuidedLinear`, and ``scale``, a scalar: 1 but for
    embeddings like Gemma's.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int,
        *,
        padding_idx: int | None = None,
        lut_dtype: torch.dtype = torch.float16,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(embedding_dim, num_embeddings, bits, lut_dtype=lut_dtype, device=device)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        # Before the codebook, because transformers takes the first float parameter's dtype for the model's.
        lut = self.lut
        del self.lut
        self.scale = nn.Parameter(torch.ones((), dtype=dtype, device=device), requires_grad=False)
        self.lut = lut

    @classmethod
    def replacing(cls, module: nn.Embedding, tensors: dict[str, Tensor]) -> "GuidedEmbedding":
        """A module in place of ``module``, around the tensors of the format.

        Raises:
            ModelError: See :func:`scale_of`.
        """
        bits = tensors["weight"].shape[0]
        rows, inputs = module.weight.shape
        embedding = cls(rows, inputs, bits, padding_idx=module.padding_idx, device="meta")
        embedding.scale = nn.Parameter(scale_of(module), requires_grad=False)
        for name, tensor in tensors.items():
            setattr(embedding, name, nn.Parameter(tensor, requires_grad=False))
        return embedding

    def prepare(self) -> None:
        """Nothing: rows are looked up in any layout."""

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        """Integers of any shape ``[...]`` -> ``[..., embedding_dim]`` in the dtype of ``scale``."""
        rows = ids.flatten()
        if self._tiled:
            codes = unpack_tile_rows(self.weight, rows, self.in_features)
        else:
            codes = unpack_codes(self.weight.index_select(1, rows), self.in_features)
        values = self.lut.index_select(0, rows).to(self.scale.dtype).gather(1, codes.long()) * self.scale
        return values.view(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}, lut_dtype={self.lut.dtype}"


class ScaledEmbedding(nn.Embedding):
    """What quantized embeddings become when they are dense again: ``y = embed_scale * W[ids]``."""

    def __init__(self, weight: nn.Parameter, scale: Tensor, padding_idx: int | None) -> None:
        super().__init__(weight.shape[0], weight.shape[1], padding_idx, device="meta")
        self.weight = weight
        self.register_buffer("embed_scale", scale.detach(), persistent=False)
        self.embed_scale: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        """Integers of any shape ``[...]`` -> ``[..., embedding_dim]`` in the dtype of the weight."""
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


@torch.no_grad()
def scale_of(module: Any) -> Tensor:
    """What dense embeddings multiply their rows with: a scalar in their dtype and on their device.

    Raises:
        ModelError: They do more than that to their rows.
    """
    weight = module.weight.detach()
    scale = torch.as_tensor(getattr(module, "embed_scale", 1.0) or 1.0).to(weight)
    some = torch.arange(min(64, weight.shape[0]), device=weight.device)
    given, expected = module(some), weight[some] * scale
    # The scale may have been rounded before it is multiplied with, or not.
    if given.shape != expected.shape or not torch.allclose(given, expected, rtol=2 * torch.finfo(weight.dtype).eps):
        raise ModelError(
            f"{type(module).__name__} does more than to look up rows and to scale them, so it cannot be quantized. "
            "Leave embedding_bits out."
        )
    return scale
