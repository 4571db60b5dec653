"""Make an accumulated Hessian fit to solve with: finite, symmetric, positive definite, of unit mean diagonal."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import HessianError

# Damping is added only where the Cholesky factorisation fails, and grows tenfold up to the cap.
_DAMPING = tuple(10.0**exponent for exponent in range(-5, 0))


@dataclass(frozen=True)
class Conditioning:
    """What was done to a layer's Hessians.

    Attributes:
        scale: Mean diagonal before normalisation, per group. Objectives times this are in units of end loss.
        dead_inputs: Inputs that never carried a value (zero diagonal), over all groups.
        damping: Largest multiple of the mean diagonal that was added.
        fallback: Why the full Hessian could not be used; only its diagonal (or nothing) guides the solver then.
    """

    scale: Tensor
    dead_inputs: int = 0
    damping: float = 0.0
    fallback: str | None = None


def condition(statistics: Tensor, layer: str) -> tuple[Tensor, Conditioning]:
    """Normalise, repair dead inputs and, for full Hessians, damp where needed.

    Args:
        statistics: fp32 Hessians ``[G, K, K]`` or their diagonals ``[G, K]``, in any scale.
        layer: Name for the error message.

    Returns:
        Statistics of the same shape with mean diagonal 1, and what was done. If all statistics are zero, or damping
        did not help, the result is a plain diagonal (in the shape that was given) and ``fallback`` says why.

    Raises:
        HessianError: NaN or infinite statistics.
    """
    if not torch.isfinite(statistics).all():
        raise HessianError(
            layer,
            "NaN or infinite entries",
            "Load the model in bfloat16 or float32 (float16 activations can overflow), or check the calibration rows.",
        )
    full = statistics.dim() == 3
    if full:
        statistics = (statistics + statistics.mT) / 2
    # A diagonal of a Gram matrix cannot be negative; rounding of a cancelled sum can make it so.
    diagonal = (statistics.diagonal(dim1=-2, dim2=-1) if full else statistics).clamp_min(0)
    scale = diagonal.mean(dim=-1)
    if (scale == 0).any():
        plain = torch.ones_like(diagonal)
        note = Conditioning(scale, int((diagonal == 0).sum()), fallback="no calibration token reached this layer")
        return (torch.diag_embed(plain) if full else plain), note
    diagonal = diagonal / scale.unsqueeze(-1)
    dead = diagonal == 0
    diagonal = torch.where(dead, torch.ones_like(diagonal), diagonal)
    dead_inputs = int(dead.sum())
    if not full:
        return diagonal, Conditioning(scale, dead_inputs)
    hessian = statistics / scale.view(-1, 1, 1)
    hessian.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
    damped, damping = _damp(hessian)
    if damped is None:
        note = Conditioning(scale, dead_inputs, _DAMPING[-1], fallback="not positive definite at the largest damping")
        return torch.diag_embed(diagonal), note
    return damped, Conditioning(scale, dead_inputs, damping)


def _damp(hessian: Tensor) -> tuple[Tensor | None, float]:
    """Add the least multiple of the identity from the list (0 first) that makes every group factorise."""
    used = 0.0
    groups = []
    for group in hessian:
        for damping in (0.0, *_DAMPING):
            candidate = group
            if damping:
                candidate = group.clone()
                candidate.diagonal().add_(damping)
            if torch.linalg.cholesky_ex(candidate)[1] == 0:
                break
        else:
            return None, damping
        groups.append(candidate)
        used = max(used, damping)
    return torch.stack(groups), used
