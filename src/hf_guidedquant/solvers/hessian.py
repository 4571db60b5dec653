"""Make an accumulated Hessian fit to solve with: finite, symmetric, positive definite, of unit mean diagonal."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import HessianError
from .base import parts

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
        Statistics of the same shape, whose diagonal has mean 1 before repairs, and what was done. A group without any
        data becomes the identity, one that damping does not help its diagonal, and ``fallback`` says why.

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
    diagonal = (statistics.diagonal(dim1=-2, dim2=-1) if full else statistics).clamp_min(0)
    # Divided by a power of two near the largest entry first (exact), so that sums stay in range for any scale.
    peak = _power_of_two(diagonal.amax(dim=-1))
    diagonal = diagonal / peak.unsqueeze(-1)
    mean = diagonal.mean(dim=-1)
    scale = mean * peak
    unit = torch.where(mean > 0, mean, torch.ones_like(mean))
    dead = diagonal == 0
    diagonal = torch.where(dead, torch.ones_like(diagonal), diagonal / unit.unsqueeze(-1))
    fallback = "no calibration token reached it, so all its inputs count the same" if (mean == 0).any() else None
    note = Conditioning(scale, int(dead.sum()), fallback=fallback)
    if not full:
        return diagonal, note
    hessian = (statistics / peak.view(-1, 1, 1)).div_(unit.view(-1, 1, 1))
    for rows in parts(hessian.shape[1], hessian[:, 0].numel()):
        # Both halves become the mean of both; what is above this part has been done.
        mean = (hessian[:, rows, rows.start :] + hessian[:, rows.start :, rows].mT).div_(2)
        hessian[:, rows, rows.start :] = mean
        hessian[:, rows.start :, rows] = mean.mT
    hessian.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
    for group in hessian:
        found = cholesky(group)
        if found is None:
            damping = _DAMPING[-1]
            group.copy_(torch.diag(group.diagonal()))
            note = replace(note, fallback="not positive definite at the largest damping, so only the diagonal is used")
        else:
            damping = found[1]
            group.diagonal().add_(damping)
        del found
        note = replace(note, damping=max(note.damping, damping))
    return hessian, note


def _power_of_two(x: Tensor) -> Tensor:
    """The largest one that is not above x, fp32 and not negative; for what is smaller, the smallest normal number.

    By its bits: with another GPU current, torch 2.11's ``ldexp`` reads what is not written yet, or fails.
    """
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_min(torch.finfo(torch.float32).tiny)


def cholesky(hessian: Tensor) -> tuple[Tensor, float] | None:
    """Factorise ``hessian [K, K]``, of mean diagonal 1, with the least damping of the list (0 first) that it takes.

    Returns the lower factor and the damping, or None if the largest was not enough.
    """
    for damping in (0.0, *_DAMPING):
        candidate = hessian
        if damping:
            candidate = hessian.clone()
            candidate.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(candidate)
        if failed == 0:
            return factor, damping
        del factor, candidate  # Large: not beside the next ones.
    return None
