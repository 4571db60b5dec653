"""One product for layers that read the same activations (q, k, v; gate, up).

The rows of the layers are concatenated, which changes nothing for codebooks per row. The model keeps its modules: the
first that is called computes the product for all and the others take their share of it, as long as they are called with
the very same tensor. The layers' parameters become views of common ones, so they are not stored twice, and what is
changed in place is changed in both.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..triton_kernels import TILE_ROWS, lut_linear_tiled, settle

if TYPE_CHECKING:
    from .guided_linear import GuidedLinear

# For more tokens, launches cost nothing beside the products, and shares would have to be copied.
_MOST_TOKENS = 64
# Products in a row of which some members did not want their share, after which a fusion is given up.
_PATIENCE = 8
# Names, within their parent, of layers that most architectures feed one tensor.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("query", "key", "value"))


class Fusion:
    """Some layers of one parent and their common product."""

    def __init__(self, members: list["GuidedLinear"]) -> None:
        self.members = members
        self.ready = False
        # What the common product takes behind the activations: of every parameter, the members' rows together.
        self._whole: tuple[Tensor | None, ...] = ()
        # The members' parameters at the time: a member that has others now is multiplied by itself.
        self._parameters: list[tuple[nn.Parameter | None, ...]] = []
        # And where in memory these were: ``parameter.data = ...`` puts something else into the same parameter.
        self._places: list[tuple[int, ...]] = []
        # Activations, what else a product depends on, the shares, and who has not had theirs yet. Replaced as a whole,
        # never changed: a thread sees all of it or none.
        self._latest: tuple[Tensor, Any, tuple[Tensor, ...], frozenset[int]] | None = None
        self._unfinished = 0
        # torch.compile looks at all that is read here before every call, so that little is.
        self._rows = tuple(member.out_features for member in members)
        self._most = _MOST_TOKENS * members[0].in_features

    def rebuild(self) -> None:
        """Concatenate the members' parameters, if they can be multiplied together as they are now."""
        self.release()
        if not self._together():
            return
        self._parameters = [_parameters(member) for member in self.members]
        self._whole = tuple(_concatenated(parameters) for parameters in zip(*self._parameters, strict=True))
        self._places = [_places(parameters) for parameters in self._parameters]
        settle(self.members[0].weight.device)
        self.ready = True

    def _together(self) -> bool:
        first, kinds = self.members[0], {_kind(member) for member in self.members}
        return len(kinds) == 1 and first.tiled and not first.weight.is_meta

    def serves(self, member: "GuidedLinear", x: Tensor) -> bool:
        """Whether the member's product with ``x`` can come from the common one."""
        if not self.ready or x.numel() > self._most:
            return False
        parameters = self._parameters[member.position]
        weight, lut, bias, values, columns = parameters
        if member.weight is not weight or member.lut is not lut or member.bias is not bias:
            return False
        if member.overlay_values is not values or member.overlay_columns is not columns:
            return False
        if not torch.compiler.is_compiling() and self._places[member.position] != _places(parameters):
            return False
        # Shares of one product would share a node of the autograd graph.
        return not torch.is_grad_enabled() or not (x.requires_grad or (bias is not None and bias.requires_grad))

    def product(self, member: "GuidedLinear", x: Tensor) -> Tensor:
        """The member's product with ``x``, from the common one if that was computed for this very tensor."""
        position = member.position
        version = version_of(x)
        latest = self._latest
        if latest is None or latest[0] is not x or latest[1] != version or position not in latest[3]:
            self._count_unfinished(latest is not None)
            if not self.ready:
                return lut_linear_tiled(x, *_parameters(member))
            shares = lut_linear_tiled(x, *self._whole).split(self._rows, dim=-1)
            latest = (x, version, shares, frozenset(range(len(self._rows))))
        waiting = latest[3] - {position}
        self._latest = (*latest[:3], waiting) if waiting else None
        # One token's share is contiguous as it is.
        return latest[2][position].contiguous()

    def _count_unfinished(self, unfinished: bool) -> None:
        """Give up on members that are not called with one tensor after all: they would compute everything for each."""
        if torch.compiler.is_compiling():
            return
        self._unfinished = self._unfinished + 1 if unfinished else 0
        if self._unfinished >= _PATIENCE:
            self.release()

    def release(self) -> None:
        """Stop serving; members keep their parameters."""
        self.ready, self._unfinished = False, 0
        self._whole, self._parameters, self._places, self._latest = (), [], [], None

    def dissolve(self) -> None:
        """Give the members parameters of their own again."""
        self.release()
        for member in self.members:
            member.fusion = None
            for parameter in _parameters(member):
                if parameter is not None:
                    parameter.data = parameter.data.clone()

    def __getstate__(self) -> dict[str, Any]:
        # Copies of the members have parameters of their own; they are fused again when they are moved.
        return vars(Fusion(self.members))


def _parameters(member: "GuidedLinear") -> tuple[nn.Parameter | None, ...]:
    """In the order in which the product takes them."""
    return member.weight, member.lut, member.bias, member.overlay_values, member.overlay_columns


def _places(parameters: tuple[nn.Parameter | None, ...]) -> tuple[int, ...]:
    """Where in memory they are."""
    return tuple(0 if parameter is None else parameter.data_ptr() for parameter in parameters)


def _kind(member: "GuidedLinear") -> tuple[Any, ...]:
    """What members must have in common, as they are now."""
    return member.tiled, *(None if p is None else (p.device, p.dtype) for p in _parameters(member))


def _concatenated(parameters: tuple[nn.Parameter | None, ...]) -> Tensor | None:
    """The members' parameters of one name as one tensor, of which they become views; None if they have none."""
    there = [parameter for parameter in parameters if parameter is not None]
    if not there:
        return None
    whole = torch.cat([parameter.data for parameter in there])
    for parameter, part in zip(there, whole.split([len(parameter) for parameter in there]), strict=True):
        parameter.data = part
    return whole


def version_of(x: Tensor) -> int:
    """How often ``x`` was changed in place, where torch counts that."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


def fuse(model: nn.Module) -> int:
    """Fuse the layers of a model that read the same activations; returns the number of products that are common now.

    What the model computes, saves and looks like stays the same. Layers that cannot be fused (different bits or
    codebook dtypes, a bias on some only, rows that do not fill tiles) stay as they are. Products are common on GPUs
    with tensor-core kernels, also once a model is moved there later, for up to 64 tokens and without gradients. Between
    the calls of two such layers nobody may change their common input in place under ``torch.inference_mode`` or
    ``torch.compile``: torch keeps no count of such changes there. Nor does compiled code notice that ``.data`` of a
    parameter has been replaced; it does notice another parameter, and what is changed in place.
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
    kinds = {(m.in_features, m.bits, m.outliers, m.bias is None) for m in members}
    free = all(m.fusion is None for m in members)
    return free and len(kinds) == 1 and all(m.out_features % TILE_ROWS == 0 for m in members)
