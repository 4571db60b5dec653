"""One product for layers that read the same activations (q, k, v; gate, up).

The rows of the layers are concatenated, which changes nothing for codebooks per row. The model keeps its modules: the
first that is called computes the product for all and the others take their share of it, as long as they are called with
the very same tensor. Each layer's parameters become views of the common ones, so nothing is stored twice.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..triton_kernels import TILE_ROWS, lut_linear_tiled, settle

if TYPE_CHECKING:
    from .guided_linear import GuidedLinear

# Products in a row of which some members did not want their share, after which a fusion is given up.
_PATIENCE = 8
# Names, within their parent, of layers that most architectures feed one tensor.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("query", "key", "value"))


class Fusion:
    """Some layers of one parent and their common product."""

    def __init__(self, members: list["GuidedLinear"]) -> None:
        self.members = members
        self.ready = False
        self._tiles: Tensor | None = None
        self._lut: Tensor | None = None
        self._bias: Tensor | None = None
        # Activations, what else a product depends on, the shares, and who has not had theirs yet. Replaced as a whole,
        # never changed: a thread sees all of it or none.
        self._latest: tuple[Tensor, Any, tuple[Tensor, ...], frozenset[int]] | None = None
        self._unfinished = 0

    def rebuild(self) -> None:
        """Concatenate the members' parameters, if they can be multiplied together where they are now."""
        self.ready, self._latest, self._unfinished = False, None, 0
        first = self.members[0]
        if not all(member.tiled and member.weight.device == first.weight.device for member in self.members):
            self._tiles = self._lut = self._bias = None
            return
        self._tiles = self._common("weight")
        self._lut = self._common("lut")
        self._bias = self._common("bias") if first.bias is not None else None
        settle(first.weight.device)
        self.ready = True

    def _common(self, name: str) -> Tensor:
        """The members' parameters of that name as one tensor, of which they become views."""
        parameters = [getattr(member, name) for member in self.members]
        whole = torch.cat([parameter.data for parameter in parameters])
        for member, part in zip(self.members, whole.split([len(p) for p in parameters]), strict=True):
            setattr(member, name, nn.Parameter(part, requires_grad=False))
        return whole

    def product(self, member: "GuidedLinear", x: Tensor) -> Tensor:
        """The member's product with ``x``, from the common one if that was computed for this very tensor."""
        position = member.position
        state = _state(x)
        latest = self._latest
        if latest is None or latest[0] is not x or latest[1] != state or position not in latest[3]:
            self._count_unfinished(latest is not None)
            if not self.ready:
                return lut_linear_tiled(x, member.weight, member.lut, member.bias)
            y = lut_linear_tiled(x, self._tiles, self._lut, self._bias)
            shares = y.split([other.out_features for other in self.members], dim=-1)
            latest = (x, state, shares, frozenset(range(len(self.members))))
        waiting = latest[3] - {position}
        self._latest = (*latest[:3], waiting) if waiting else None
        return latest[2][position]

    def _count_unfinished(self, unfinished: bool) -> None:
        """Give up on members that are not called with one tensor after all: they would compute everything for each."""
        if torch.compiler.is_compiling():
            return
        self._unfinished = self._unfinished + 1 if unfinished else 0
        if self._unfinished >= _PATIENCE:
            self.ready, self._latest = False, None

    def dissolve(self) -> None:
        """Give the members parameters of their own again."""
        for member in self.members:
            member.fusion = None
            if self._tiles is not None:
                for name in ("weight", "lut", "bias"):
                    parameter = getattr(member, name)
                    if parameter is not None:
                        setattr(member, name, nn.Parameter(parameter.data.clone(), requires_grad=False))
        self.ready, self._tiles, self._lut, self._bias, self._latest = False, None, None, None, None

    def __getstate__(self) -> dict[str, Any]:
        # Copies of the members have parameters of their own; they are fused again when they are moved.
        return vars(Fusion(self.members))


def _state(x: Tensor) -> tuple[bool, int]:
    """What, besides its identity, decides whether a product with ``x`` still holds: gradients, changes in place."""
    frozen = torch.compiler.is_compiling() or x.is_inference()
    return torch.is_grad_enabled(), 0 if frozen else x._version


def fuse(model: nn.Module) -> int:
    """Fuse the layers of a model that read the same activations; returns the number of fused products.

    What the model computes, saves and looks like stays the same. Layers that cannot be fused (different bits or
    codebook dtypes, a bias on some only, rows that do not fill tiles) stay as they are. Products are common only on
    GPUs with tensor-core kernels.
    """
    from .guided_linear import GuidedLinear

    fused = 0
    for parent in model.modules():
        children = dict(parent.named_children())
        for names in SIBLINGS:
            found = [children.get(name) for name in names]
            members = [module for module in found if isinstance(module, GuidedLinear)]
            if len(members) == len(names) and _compatible(members):
                fusion = Fusion(members)
                for position, member in enumerate(members):
                    member.fusion, member.position = fusion, position
                fusion.rebuild()
                fused += fusion.ready
    return fused


def unfuse(model: nn.Module) -> None:
    """Undo :func:`fuse`."""
    for module in model.modules():
        fusion = getattr(module, "fusion", None)
        if isinstance(fusion, Fusion):
            fusion.dissolve()


def _compatible(members: list["GuidedLinear"]) -> bool:
    kinds = {(m.in_features, m.bits, m.lut.dtype, m.bias is None, m.fusion is None) for m in members}
    biases = {m.bias.dtype for m in members if m.bias is not None}
    return (
        len(kinds) == 1
        and members[0].fusion is None
        and len(biases) <= 1
        and all(m.out_features % TILE_ROWS == 0 for m in members)
    )
