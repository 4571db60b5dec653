"""An output head and the input embeddings with one copy of their codes and codebooks."""

import weakref
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from .guided_embedding import GuidedEmbedding
    from .guided_linear import GuidedLinear


class Tie:
    """Keeps the parameters of a head and its embeddings the same objects, in the layout that the head wants.

    Args:
        embedding, head: Of the same shape, bits and codebook dtype. The embeddings get the head's parameters.
    """

    def __init__(self, embedding: "GuidedEmbedding", head: "GuidedLinear") -> None:
        self.embedding, self.head = embedding, head
        self._planes: weakref.ref[Tensor] | None = None
        embedding.tie = head.tie = self
        self.share(head)

    def share(self, source: "GuidedLinear") -> None:
        """Give both what one of them has."""
        self._planes = None
        for member in (self.embedding, self.head):
            member.weight, member.lut, member._tiled = source.weight, source.lut, source.tiled

    def planes(self) -> Tensor | None:
        """The codes as bit-planes, if somebody still has them: whoever writes files sees one tensor, not two."""
        return None if self._planes is None else self._planes()

    def remember(self, planes: Tensor) -> None:
        self._planes = weakref.ref(planes)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_planes": None}
