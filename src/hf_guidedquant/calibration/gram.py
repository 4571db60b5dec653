"""Sums of outer products: ``H += xᵀ x`` with fp32 sums, on tensor cores where the activations allow it."""

import functools

import torch
from torch import Tensor

# Inputs of a stripe at least, and stripes at most: H is symmetric, so of every stripe of rows only what lies on and
# left of the diagonal is computed. Four stripes save 37 % of the work.
_STRIPE, _STRIPES = 2048, 4


def add_grams(total: Tensor, x: Tensor, weights: Tensor | None) -> None:
    """``total[k] += Σ_t weights[t, k] x_t x_tᵀ`` on and below the diagonal; :func:`mirror` fills in what lies above.

    Args:
        total: fp32 ``[g, K, K]``.
        x: ``[T, K]``, any float dtype.
        weights: fp32 ``[T, g]``, not negative; None for 1.
    """
    roots = x.new_ones(len(total), 1, 1) if weights is None else weights.mT.sqrt().unsqueeze(-1)  # [g, T or 1, 1]
    stripes, together = _stripes(total.shape[-1]), groups_at_a_time(total.shape[-1], len(total))
    for sums, root in zip(total.split(together), roots.split(together), strict=True):
        scaled = torch.empty(len(sums), *x.shape, dtype=_product_dtype(x, weights is not None), device=x.device)
        torch.mul(x, root, out=scaled)
        for start, stop in stripes:
            _add_product(sums[:, start:stop, :stop], scaled[..., start:stop].mT, scaled[..., :stop])


def groups_at_a_time(inputs: int, groups: int) -> int:
    """How many groups' scaled inputs exist together.

    Products of few inputs fill a GPU only together; of many, the scaled inputs of all groups would be large.
    """
    return groups if len(_stripes(inputs)) == 1 else 1


def add_squares(total: Tensor, x: Tensor, weights: Tensor | None) -> None:
    """The diagonals only: ``total[k] += Σ_t weights[t, k] x_t²``, fp32 ``[g, K]``; else as :func:`add_grams`."""
    squares = x.float().square()
    if weights is None:
        total += squares.sum(dim=0)
    else:
        total.addmm_(weights.mT, squares)


def _product_dtype(x: Tensor, weighted: bool) -> torch.dtype:
    """What the factors of the products are rounded to.

    16-bit activations on a GPU stay 16-bit. Scaled by the root of a token's weight they do not fit fp16's range, so
    they are bf16 then; both factors are the same rounded numbers, so the sum stays positive semidefinite.
    """
    if x.device.type != "cuda" or x.dtype not in (torch.float16, torch.bfloat16) or not _mixed_products():
        return torch.float32
    return torch.bfloat16 if weighted else x.dtype


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right`` of ``[g, …]`` each; a single product has the faster kernels."""
    if len(total) == 1:
        total, left, right = total[0], left[0], right[0]
    add = torch.addmm if total.dim() == 2 else torch.baddbmm
    if left.dtype == torch.float32:
        add(total, left, right, out=total)
    else:
        add(total, left, right, out_dtype=torch.float32, out=total)


def mirror(total: Tensor) -> None:
    """Copy what lies below the diagonal of ``[..., K, K]`` to above it, in place."""
    for start, stop in _stripes(total.shape[-1]):
        total[..., :start, start:stop] = total[..., start:stop, :start].mT


def _stripes(size: int) -> list[tuple[int, int]]:
    count = max(1, min(_STRIPES, size // _STRIPE))
    # Tensor cores like multiples of 128.
    step = -(-size // (128 * count)) * 128
    return [(start, min(start + step, size)) for start in range(0, size, step)]


@functools.cache
def _mixed_products() -> bool:
    """Whether torch adds 16-bit products to an fp32 matrix; it can since 2.8."""
    return "dtype_out" in torch.ops.aten.addmm.overloads()
