"""The tiled layout, and the tensor-core kernels' indexing and masks without a GPU.

The byte permutes and MMAs of prmt.py are replaced by the same arithmetic in plain Triton, which the interpreter runs.
"""

import pytest
import torch
from interpreter import interpreter_only, not_interpreted, run_interpreted_tests
from test_ops import activations, assert_close_to_truth, dense64, layer

from hf_guidedquant.triton_kernels import (
    OPS_NAMESPACE,
    TILED_BITS,
    lut_dequantize,
    lut_dequantize_tiled,
    lut_linear,
    lut_linear_tiled,
    pack_tiles,
    tiles,
    unpack_codes,
    unpack_tile_rows,
    unpack_tiles,
)
from hf_guidedquant.triton_kernels.configs import MatrixConfig, PrefillConfig, VectorConfig, choose, table

OPS = getattr(torch.ops, OPS_NAMESPACE)
SHAPES = [(1, 1), (16, 128), (17, 129), (40, 576), (33, 255)]


@pytest.mark.parametrize("bits", TILED_BITS)
@pytest.mark.parametrize(("rows", "inputs"), SHAPES)
def test_tiles_hold_the_codes_and_only_them(rows, inputs, bits):
    _, weight, _ = layer(bits, rows, inputs)
    packed = pack_tiles(weight, inputs)
    assert packed.shape == tiles.tiles_shape(bits, rows, inputs)
    assert packed.dtype == torch.int32
    assert torch.equal(unpack_tiles(packed, rows, inputs), weight)
    # Padding is code 0: a second way to the same tiles, through a weight that is padded beforehand.
    whole_rows, whole_inputs = -(-rows // 16) * 16, -(-inputs // 128) * 128
    words = torch.zeros(bits, whole_rows, whole_inputs // 32, dtype=torch.int32)
    words[:, :rows, : weight.shape[2]] = weight
    assert torch.equal(pack_tiles(words, whole_inputs), packed)


@pytest.mark.parametrize("bits", TILED_BITS)
def test_tiles_in_several_chunks_are_the_same(bits, monkeypatch):
    _, weight, _ = layer(bits, 70, 300)
    packed = pack_tiles(weight, 300)
    monkeypatch.setattr(tiles, "_CHUNK", 2 * 16 * 384)  # two row tiles at a time, and one left over
    assert torch.equal(pack_tiles(weight, 300), packed)
    assert torch.equal(unpack_tiles(packed, 70, 300), weight)


def test_nothing_at_all_is_an_empty_sum():
    no_inputs = pack_tiles(torch.zeros(2, 5, 0, dtype=torch.int32), 0)
    assert torch.equal(lut_linear_tiled(torch.ones(3, 0), no_inputs, torch.ones(5, 4)), torch.zeros(3, 5))
    no_rows = pack_tiles(torch.zeros(2, 0, 2, dtype=torch.int32), 40)
    assert unpack_tiles(no_rows, 0, 40).shape == (2, 0, 2)
    assert lut_linear_tiled(torch.ones(3, 40), no_rows, torch.ones(0, 4)).shape == (3, 0)


@pytest.mark.parametrize("bits", TILED_BITS)
def test_every_bit_of_a_lane_has_one_place(bits):
    one_code = torch.zeros(16, 128, dtype=torch.uint8)
    seen = torch.zeros(64 * bits, dtype=torch.int64)
    for row in (0, 5, 8, 15):
        for k in (0, 7, 31, 32, 127):
            for bit in range(bits):
                one_code.zero_()
                one_code[row, k] = 1 << bit
                word = pack_tiles(tiles.pack_codes(one_code, bits), 128).flatten().long() & 0xFFFFFFFF
                assert (word != 0).sum() == 1
                assert (seen & word).sum() == 0
                seen |= word


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", TILED_BITS)
def test_tiled_ops_equal_the_others_on_a_cpu(bits, dtype):
    _, weight, lut = layer(bits, 21, 150)
    x, bias = activations(3, 150, dtype=dtype), activations(21, dtype=torch.float32, seed=2)
    packed = pack_tiles(weight, 150)
    assert torch.equal(lut_linear_tiled(x, packed, lut, bias), lut_linear(x, weight, lut, bias))
    assert torch.equal(lut_dequantize_tiled(packed, lut, 150, dtype), lut_dequantize(weight, lut, 150, dtype))


def test_tiled_ops_pass_opcheck_and_have_gradients():
    codes, weight, lut = layer(3, 21, 150)
    packed, bias = pack_tiles(weight, 150), torch.ones(21)
    x = activations(3, 150, dtype=torch.float32).requires_grad_()
    torch.library.opcheck(OPS.lut_linear_tiled.default, (x, packed, lut, bias))
    torch.library.opcheck(OPS.lut_dequantize_tiled.default, (packed, lut, 150, torch.float16))
    upstream = activations(3, 21, dtype=torch.float32, seed=2)
    (gradient,) = torch.autograd.grad(lut_linear_tiled(x, packed, lut, bias), x, upstream)
    assert_close_to_truth(gradient, upstream, dense64(codes, lut, torch.float32).mT)


BROKEN = {
    "tiles-2d": ({"tiles": torch.zeros(2, 128, dtype=torch.int32)}, r"\[row tiles, blocks, words\]"),
    "tiles-int64": ({"tiles": torch.zeros(2, 2, 128, dtype=torch.int64)}, "int32"),
    "tiles-words": ({"tiles": torch.zeros(2, 2, 100, dtype=torch.int32)}, "100 words"),
    "tiles-5-bits": ({"tiles": torch.zeros(2, 2, 320, dtype=torch.int32)}, "320 words"),
    "tiles-rows": ({"tiles": torch.zeros(3, 2, 128, dtype=torch.int32)}, r"take tiles \(2, 2, 128\)"),
    "tiles-blocks": ({"tiles": torch.zeros(2, 1, 128, dtype=torch.int32)}, r"take tiles \(2, 2, 128\)"),
    "lut-entries": ({"lut": torch.zeros(21, 8)}, r"lut must be \[21, 4\]"),
    "lut-1d": ({"lut": torch.zeros(21)}, "lut must be"),
    "bias": ({"bias": torch.zeros(20)}, r"bias must be \[21\]"),
    "x-integer": ({"x": torch.ones(1, 150, dtype=torch.int64)}, "floating point"),
}


@pytest.mark.parametrize("what", list(BROKEN))
def test_tiled_linear_refuses_what_does_not_fit(what):
    change, message = BROKEN[what]
    _, weight, lut = layer(2, 21, 150)
    arguments = {"x": torch.ones(1, 150), "tiles": pack_tiles(weight, 150), "lut": lut, "bias": None} | change
    with pytest.raises(RuntimeError, match=message):
        lut_linear_tiled(**arguments)


def test_the_table_has_a_launch_for_every_product_that_is_not_better_dense():
    for bits in TILED_BITS:
        for tokens in (1, 2, 8, 9, 16, 33, 64):
            for rows, inputs in ((1, 1), (576, 576), (28672, 4096), (10**6, 10**5)):
                config = choose((9, 0), bits, tokens, rows, inputs)
                if tokens <= 16:
                    assert config is not None
        assert choose((8, 0), bits, 10**6, 4096, 4096) is None
        assert choose((9, 0), bits, 10**6, 4096, 4096) == choose((9, 0), bits, max(table()[bits]), 4096, 4096)
    for bits, counts in table().items():
        for count, shapes in counts.items():
            for shape, config in shapes.items():
                if isinstance(config, VectorConfig):
                    assert config.warps in (1, 2, 4, 8, 16), (bits, count, shape)
                    assert config.overlap in (0, 1, 2)
                assert choose((9, 0), bits, count, *shape) is None or config is not None
                older = choose((8, 0), bits, count, *shape)
                assert not isinstance(older, MatrixConfig | PrefillConfig)  # want more than older GPUs have
                assert older is None or older.overlap == 0  # dependent launches exist from sm_90 on


@not_interpreted
@pytest.mark.timeout(900)
def test_everything_below_in_a_process_with_the_interpreter():
    run_interpreted_tests(__file__)


def interpreted_linear(x, weight, lut, bias, config: VectorConfig) -> torch.Tensor:
    """The kernel's result in a frame of NaN, which must stay; x must be aligned."""
    from hf_guidedquant.triton_kernels.tile_kernels import vector_kernel

    tokens, (rows, inputs), bits = x.shape[0], (lut.shape[0], x.shape[1]), weight.shape[0]
    frame = torch.full((tokens * rows + 128,), float("nan"), dtype=x.dtype)
    y = frame[64:-64].view(tokens, rows)
    grid = (-(-rows // (16 * config.row_tiles)), -(-tokens // (8 * config.token_tiles)))
    vector_kernel[grid](
        x, pack_tiles(weight, inputs), lut, lut if bias is None else bias, y, tokens, rows, inputs, x.stride(0) // 8,
        BITS=bits, ROW_TILES=config.row_tiles, TOKEN_TILES=config.token_tiles, UNROLL=config.unroll, WARPS=config.warps,
        BF16=x.dtype == torch.bfloat16, CONVERT=x.dtype != lut.dtype, HAS_BIAS=bias is not None,
        EVEN=inputs % (128 * config.warps * config.unroll) == 0, PDL=0, AHEAD=config.ahead, ASM=False,
    )  # fmt: skip
    assert frame[:64].isnan().all()
    assert frame[-64:].isnan().all()
    return y


CASES = {
    "one-tile": (2, 16, 128, 1, torch.float16, VectorConfig(1, 1, 1, 1, 0, 0)),
    "two-warps": (2, 20, 136, 3, torch.float16, VectorConfig(1, 1, 1, 2, 0, 0)),
    "more-warps-than-blocks": (2, 20, 264, 8, torch.float16, VectorConfig(1, 1, 1, 8, 0, 0)),
    "unrolled": (2, 33, 776, 1, torch.float16, VectorConfig(1, 1, 4, 1, 0, 0)),
    "even": (2, 16, 1024, 2, torch.float16, VectorConfig(1, 1, 2, 2, 0, 0)),
    "ahead": (3, 20, 1160, 3, torch.float16, VectorConfig(1, 1, 2, 2, 0, 1)),
    "ahead-even": (2, 40, 512, 17, torch.float16, VectorConfig(2, 2, 2, 1, 0, 1)),
    "row-tiles": (2, 40, 264, 9, torch.float16, VectorConfig(2, 1, 1, 2, 0, 0)),
    "token-tiles": (2, 17, 264, 33, torch.float16, VectorConfig(1, 2, 1, 2, 0, 0)),
    "bfloat16": (2, 17, 264, 2, torch.bfloat16, VectorConfig(1, 1, 1, 4, 0, 0)),
    "3-bit": (3, 17, 200, 2, torch.float16, VectorConfig(1, 1, 1, 2, 0, 0)),
    "3-bit-tiles": (3, 40, 264, 12, torch.float16, VectorConfig(2, 2, 1, 1, 0, 0)),
    "4-bit": (4, 17, 136, 2, torch.float16, VectorConfig(1, 1, 1, 1, 0, 0)),
}


@interpreter_only
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("case", list(CASES))
def test_interpreted_linear_against_float64(case, with_bias):
    bits, rows, inputs, tokens, dtype, config = CASES[case]
    codes, weight, lut = layer(bits, rows, inputs, dtype)
    # A row ends where NaN begins, and rows are farther apart than they are long.
    frame = torch.full((tokens + 1, inputs + 8), float("nan"), dtype=dtype)
    x = frame[:tokens, :inputs].copy_(activations(tokens, inputs, dtype=dtype))
    bias = activations(rows, dtype=torch.float32, seed=3) if with_bias else None
    y = interpreted_linear(x, weight, lut, bias, config)
    if dtype == torch.bfloat16:
        # The interpreter truncates fp32 to bf16 instead of rounding, the sum like the bias: each loses up to one unit
        # in the last place instead of a half.
        dense, added = dense64(codes, lut, dtype), torch.zeros(rows) if bias is None else bias
        exact = x.double() @ dense.mT + added.double()
        summing = inputs * torch.finfo(torch.float32).eps * (x.double().abs() @ dense.abs().mT + added.abs())
        rounding = torch.finfo(dtype).eps * (exact.abs() + 2 * added.abs())
        assert ((y.double() - exact).abs() <= rounding + summing).all()
    else:
        assert_close_to_truth(y, x, dense64(codes, lut, dtype), bias)


@interpreter_only
@pytest.mark.parametrize("bits", TILED_BITS)
@pytest.mark.parametrize(
    ("rows", "inputs", "tokens", "warps", "splits"),
    [(20, 136, 17, 2, 1), (16, 128, 16, 1, 1), (70, 264, 5, 4, 2), (16, 520, 18, 1, 4)],
)
def test_interpreted_matrix_product_against_float64(rows, inputs, tokens, warps, splits, bits):
    from hf_guidedquant.triton_kernels.tile_kernels import add_splits_kernel, matrix_kernel

    for dtype, bias in ((torch.float16, None), (torch.float16, torch.randn(rows))):
        codes, weight, lut = layer(bits, rows, inputs, dtype)
        frame = torch.full((tokens + 1, inputs + 8), float("nan"), dtype=dtype)
        x = frame[:tokens, :inputs].copy_(activations(tokens, inputs, dtype=dtype))
        result = torch.full((tokens * rows + 128,), float("nan"), dtype=dtype)
        y = result[64:-64].view(tokens, rows)
        parts = torch.full((splits, tokens, rows), float("nan")) if splits > 1 else y
        matrix_kernel[(-(-rows // (16 * warps)), -(-tokens // 16), splits)](
            x, pack_tiles(weight, inputs), lut, lut if bias is None else bias, parts, tokens, rows, inputs,
            x.stride(0) // 8, BITS=bits, TOKENS=16, WARPS=warps, STAGES=2, BF16=False, CONVERT=False,
            HAS_BIAS=bias is not None and splits == 1, ASM=False,
        )  # fmt: skip
        if splits > 1:
            add_splits_kernel[(-(-tokens * rows // 256),)](
                parts, lut if bias is None else bias, y, tokens * rows, rows, splits,
                HAS_BIAS=bias is not None, BLOCK=256,
            )  # fmt: skip
        assert result[:64].isnan().all()
        assert result[-64:].isnan().all()
        assert_close_to_truth(y, x, dense64(codes, lut, dtype), bias)


@interpreter_only
def test_interpreted_linear_converts_the_codebook():
    codes, weight, lut = layer(2, 16, 128)
    lut = lut.bfloat16().half()  # exact in both, so that the interpreter's truncation does not matter
    x = torch.eye(8, 128).bfloat16()
    y = interpreted_linear(x, weight, lut, None, VectorConfig(1, 1, 1, 1, 0, 0))
    assert torch.equal(y.double(), dense64(codes, lut, torch.bfloat16)[:, :8].mT)


@interpreter_only
@pytest.mark.parametrize("bits", TILED_BITS)
def test_interpreted_dequantize_is_a_gather_without_any_error(bits):
    from hf_guidedquant.triton_kernels.tile_kernels import dequantize_kernel

    codes, weight, lut = layer(bits, 17, 136)
    packed = pack_tiles(weight, 136)
    frame = torch.full((17 * 136 + 128,), float("nan"), dtype=torch.float16)
    dense = frame[64:-64].view(17, 136)
    dequantize_kernel[(2, 1)](
        packed, lut, dense.view(torch.int32), 17, 136, 17, BITS=bits, WARPS=2, CONVERT=False, ASM=False
    )
    assert torch.equal(dense.double(), dense64(codes, lut, torch.float16))
    assert frame[:64].isnan().all()
    assert frame[-64:].isnan().all()


@pytest.mark.parametrize("bits", TILED_BITS)
@pytest.mark.parametrize(("rows", "inputs"), SHAPES)
def test_single_rows_of_tiles_are_those_of_the_bit_planes(rows, inputs, bits):
    _, weight, _ = layer(bits, rows, inputs)
    codes = unpack_codes(weight, inputs)
    for wanted in (torch.arange(rows), torch.tensor([rows - 1, 0, rows - 1, rows // 2]), torch.arange(0)):
        found = unpack_tile_rows(pack_tiles(weight, inputs), wanted, inputs)
        assert found.dtype == torch.uint8
        assert torch.equal(found, codes[wanted])
