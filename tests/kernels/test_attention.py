"""Attention of one query per row against float64, per element."""

import pytest
import torch
from interpreter import interpreter_only, not_interpreted, run_interpreted_tests

from hf_guidedquant.triton_kernels import OPS_NAMESPACE, decode_attention

OP = getattr(torch.ops, OPS_NAMESPACE).decode_attention.default
# Batch, heads, key heads, length, width, width of values.
SHAPES = [(1, 1, 1, 1, 16, 16), (2, 4, 2, 65, 64, 64), (3, 9, 3, 200, 80, 48), (1, 16, 2, 1000, 128, 128)]
MASKS = ["none", "shared", "rows", "holes"]


def problem(shape, dtype, mask_kind, device="cpu", scale=1.0):
    """Query, keys and values as views with gaps of NaN between them, and a mask of the kind."""
    batch, heads, key_heads, length, width, value_width = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def gapped(*sizes):
        frame = torch.full((*sizes[:-2], sizes[-2] + 1, sizes[-1] + 8), torch.nan, dtype=dtype)
        frame[..., :-1, :-8] = torch.randn(sizes, generator=generator).mul(scale)
        return frame.to(device)[..., :-1, :-8]

    query = gapped(batch, heads, 1, width)
    key, value = gapped(batch, key_heads, length, width), gapped(batch, key_heads, length, value_width)
    place = torch.arange(length)
    first = torch.arange(batch)[:, None] % length
    mask = {
        "none": None,
        "shared": (place < (length + 1) // 2)[None, None, None],
        "rows": ((place >= first) & (place < max(1, length - 1) + first))[:, None, None],
        "holes": ((place // 64 % 2 == 0) & (place % 3 != 1))[None, None, None].expand(batch, 1, 1, length),
    }[mask_kind]
    if mask is not None:
        mask = mask.to(device)
        # What is masked may be anything, as in a part of a static cache that was never written.
        key = key.masked_fill(~mask.expand(batch, 1, 1, length).mT, torch.nan)
    return query, key, value, mask


def assert_attends(result, query, key, value, mask, scale):
    """Every element within what rounding may cost.

    A score of K products in fp32 is off by at most d = K eps scale max Σ|q||k|, and exp2 takes it in units of log 2
    to a few eps of its size; so a weight is off by the factor exp(± e), e = 2 d + 4 eps max|score|, and the largest
    score that it is relative to likewise. Weights are rounded to the dtype (u), their sums and products take another
    length eps; the result is rounded once more.
    """
    group = query.shape[1] // key.shape[1]
    q, k, v = (t.double() for t in (query, key, value))
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    keep = torch.ones_like(k[..., 0], dtype=torch.bool) if mask is None else mask[:, 0].expand(*k.shape[:-1])
    k = k.masked_fill(~keep[..., None], 0)
    scores = (q @ k.mT).mul(scale).masked_fill(~keep[..., None, :], -torch.inf)
    weights = scores.softmax(dim=-1)
    exact, magnitude = weights @ v, weights @ v.abs()
    eps = torch.finfo(torch.float32).eps
    unit = 0 if query.dtype == torch.float32 else torch.finfo(query.dtype).eps / 2
    products = (q.abs() @ k.abs().mT).mul(scale).masked_fill(~keep[..., None, :], 0).amax(dim=-1, keepdim=True)
    of_scores = 2 * (2 * q.shape[-1] * eps * products + 4 * eps * (products + 1))
    relative = torch.expm1(of_scores) * 2 + unit + 2 * (key.shape[2] + 4) * eps
    bound = relative * magnitude * (1 + unit) + torch.finfo(query.dtype).eps / 2 * exact.abs()
    tiny = torch.finfo(query.dtype).smallest_normal
    assert result.dtype == query.dtype
    assert result.shape == exact.shape
    assert ((result.double() - exact).abs() <= bound + tiny).all()


@pytest.mark.parametrize("mask_kind", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_kernel_torch_computes_it(shape, mask_kind):
    query, key, value, mask = problem(shape, torch.float32, mask_kind)
    # torch multiplies what is masked with 0.
    key = key.nan_to_num()
    assert_attends(decode_attention(query, key, value, mask, 0.25), query, key, value, mask, 0.25)
    torch.library.opcheck(OP, (query, key, value, mask, 0.25))


@not_interpreted
@pytest.mark.timeout(900)
def test_everything_below_in_a_process_with_the_interpreter():
    run_interpreted_tests(__file__)


@interpreter_only
@pytest.mark.parametrize("mask_kind", MASKS)
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_interpreted_attention_against_float64(shape, mask_kind):
    from hf_guidedquant.triton_kernels import attention

    query, key, value, mask = problem(shape, torch.float16, mask_kind)
    assert_attends(attention.decode_attention(query, key, value, mask, 0.3), query, key, value, mask, 0.3)


@pytest.mark.gpu
class TestOnGpu:
    @pytest.mark.parametrize("mask_kind", MASKS)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
    def test_against_float64(self, dtype, mask_kind, scale):
        for shape in (*SHAPES, (1, 32, 8, 4100, 128, 128), (2, 8, 1, 129, 256, 256), (300, 2, 2, 70, 64, 64)):
            query, key, value, mask = problem(shape, dtype, mask_kind, "cuda", scale)
            result = decode_attention(query, key, value, mask, 0.1)
            assert_attends(result, query, key, value, mask, 0.1)
            assert torch.equal(decode_attention(query, key, value, mask, 0.1), result)

    def test_captured_and_compiled(self):
        query, key, value, mask = problem(SHAPES[3], torch.float16, "shared", "cuda")
        expected = decode_attention(query, key, value, mask, 0.1)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            result = decode_attention(query, key, value, mask, 0.1)
        result.fill_(torch.nan)
        graph.replay()
        assert torch.equal(result, expected)
        compiled = torch.compile(lambda q: decode_attention(q * 2, key, value, mask, 0.1), fullgraph=True)
        assert torch.equal(compiled(query), decode_attention(query * 2, key, value, mask, 0.1))

    def test_a_cache_of_more_than_two_to_the_31_numbers(self):
        length, width = 2**21, 128
        key = torch.zeros(1, 9, length, width, dtype=torch.float16, device="cuda")
        key[0, 8, -70:] = torch.randn(70, width, device="cuda").half()
        mask = (torch.arange(length, device="cuda") >= length - 70)[None, None, None]
        query = torch.randn(1, 9, 1, width, device="cuda").half()
        result = decode_attention(query, key, key, mask, 0.1)
        tail = key[:, :, -70:]
        assert_attends(result, query, tail, tail, None, 0.1)
