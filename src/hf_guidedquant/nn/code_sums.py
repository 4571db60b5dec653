"""Sums of a matrix's values by their codes, row by row: what the gradient of a codebook is made of."""

import torch
from torch import Tensor

from ..triton_kernels import backend_for, unpack_codes


def sums_by_code(values: Tensor, codes: Tensor, levels: int) -> Tensor:
    """``result[n, l] = Σ_{k: codes[n, k] = l} values[n, k]``, the same bits at every call.

    Args:
        values: fp32 or fp64 ``[N, K]``.
        codes: uint8 ``[N, K]``, or bit-planes of them, int32 ``[bits, N, ceil(K / 32)]``.
        levels: Number of codes, a power of two.

    Returns:
        ``[N, levels]`` in the dtype of ``values``.
    """
    if values.dtype == torch.float32 and values.numel() and backend_for(values.device) != "torch":
        from .code_sums_kernel import sums_by_code as fused

        return fused(values, codes, levels)
    if codes.dim() == 3:
        codes = unpack_codes(codes, values.shape[1])
    return torch.stack([torch.where(codes == level, values, 0.0).sum(dim=1) for level in range(levels)], dim=1)
