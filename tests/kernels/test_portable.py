"""The plain Triton kernels against float64: compiled where there is a CUDA device, interpreted on the CPU elsewhere."""

import os
import subprocess
import sys

import pytest
import torch
from test_ops import activations, activations_of_all_shapes, assert_close_to_truth, dense64, layer

pytest.importorskip("triton")
from hf_guidedquant.triton_kernels import pack_codes, portable, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS_HERE = torch.cuda.is_available() or portable.INTERPRETED
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# All bits for one token and for few, two for every other size: around the tiles of 16, 32 and 64 tokens.
BITS_AND_TOKENS = [
    *((bits, tokens) for tokens in (1, 9) for bits in range(1, 9)),
    *((bits, tokens) for tokens in (2, 7, 8, 16, 33, 64, 65) for bits in (2 + tokens % 3, 5 + tokens % 4)),
]
# Around a word, around what a program takes at a time (up to 1024 inputs), and more rows than a program has.
SHAPES = [(1, 1), (3, 31), (5, 32), (4, 33), (17, 129), (33, 257), (9, 1025)]


@pytest.mark.skipif(RUNS_HERE, reason="the tests of this file run in this process")
@pytest.mark.timeout(900)
def test_everything_below_in_a_process_with_the_interpreter():
    # Triton must find the variable when it is first imported. Here conftest has imported transformers, and that triton.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout


def on_device(tensor: torch.Tensor) -> torch.Tensor:
    """The same view of a copy of the whole storage: what lies between and around the elements comes along."""
    whole = torch.tensor([], dtype=tensor.dtype).set_(tensor.untyped_storage()).to(DEVICE)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def lut_linear(x, weight, lut, bias=None):
    """The kernel's result on the CPU, for tensors on the CPU."""
    arguments = (None if tensor is None else on_device(tensor) for tensor in (x, weight, lut, bias))
    return portable.lut_linear(*arguments).cpu()


def lut_dequantize(weight, lut, in_features, dtype):
    """The kernel's result on the CPU, for tensors on the CPU."""
    return portable.lut_dequantize(on_device(weight), on_device(lut), in_features, dtype).cpu()


def surrounded(tensor: torch.Tensor, by: float) -> torch.Tensor:
    """A view of the same content with ``by`` before, after and between its rows."""
    frame = torch.full([size + 2 for size in tensor.shape], by, dtype=tensor.dtype)
    return frame[tuple(slice(1, -1) for _ in tensor.shape)].copy_(tensor)


@pytest.fixture
def poisoned(monkeypatch):
    """Every `torch.empty` is full of NaN and lies between guards, which must be untouched in the end."""
    guarded, empty, guard = [], torch.empty, 64

    def poison(*shape, **options):
        size = torch.Size(shape).numel()
        guarded.append(empty(size + 2 * guard, **options).fill_(float("nan")))
        return guarded[-1][guard:-guard].view(shape)

    monkeypatch.setattr(torch, "empty", poison)
    yield
    assert guarded
    for whole in guarded:
        assert whole[:guard].isnan().all()
        assert whole[-guard:].isnan().all()


# A class, because pytest can be told to leave out a class.
class TestPortable:
    __test__ = RUNS_HERE

    @pytest.mark.parametrize(("bits", "tokens"), BITS_AND_TOKENS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_linear_against_float64_per_element(self, dtype, bits, tokens):
        inputs = 257 if tokens % 2 else 272  # Triton compiles multiples of 16 apart.
        codes, weight, lut = layer(bits, 33, inputs)
        x = activations(tokens, inputs, dtype=dtype, seed=tokens)
        bias = activations(33, dtype=torch.float32, seed=5) if bits % 2 else None
        assert_close_to_truth(lut_linear(x, weight, lut, bias), x, dense64(codes, lut, dtype), bias)

    @pytest.mark.parametrize(("rows", "inputs"), SHAPES)
    @pytest.mark.parametrize("tokens", [1, 3])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_only_the_result_is_written_and_nothing_beyond_x_is_read(self, dtype, tokens, rows, inputs, poisoned):
        codes, weight, lut = layer(3, rows, inputs)
        x = activations(tokens, inputs, dtype=dtype)
        result = lut_linear(surrounded(x, float("nan")), surrounded(weight, -1), lut)
        assert_close_to_truth(result, x, dense64(codes, lut, dtype))

    @pytest.mark.parametrize("lut_dtype", DTYPES)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_largest_tiles_and_other_codebook_dtypes(self, dtype, lut_dtype):
        codes, weight, lut = layer(2, 65, 70, lut_dtype)
        x, bias = activations(259, 70, dtype=dtype), activations(65, dtype=lut_dtype)
        assert_close_to_truth(lut_linear(x, weight, lut, bias), x, dense64(codes, lut, dtype), bias)

    @pytest.mark.parametrize("tokens", [1, 7])
    @pytest.mark.parametrize("sign", [-1, 1])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_large_activations_whose_partial_sums_leave_fp16_but_whose_result_does_not(self, dtype, sign, tokens):
        codes = torch.arange(40).remainder(4).div(2, rounding_mode="floor").to(torch.uint8).expand(5, 40)
        lut = torch.tensor([[-1.0, 1.0]]).half().expand(5, 2)
        x = torch.full((tokens, 40), sign * 6e4).to(dtype)  # pairs sum to 1.2e5 before they cancel
        x[:, -1] = -3.0
        result = lut_linear(x, pack_codes(codes, 1), lut)
        assert torch.isfinite(result).all()
        assert_close_to_truth(result, x, dense64(codes, lut, dtype))

    @pytest.mark.parametrize("tokens", [1, 7])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_denormal_activations_and_codewords_are_not_flushed(self, dtype, tokens):
        codes, weight, _ = layer(2, 5, 40)
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        lut = torch.tensor([[-2.0, -1.0, 1.0, 2.0]]).expand(5, 4)
        # Whole multiples of the smallest subnormal, small enough for every mantissa: nothing rounds.
        x = torch.full((tokens, 40), smallest, dtype=torch.float64).to(dtype)
        assert torch.equal(lut_linear(x, weight, lut).double(), x.double() @ dense64(codes, lut, dtype).mT)
        lut, ones = lut.double() * smallest, torch.ones(tokens, 40, dtype=dtype)
        assert torch.equal(lut_linear(ones, weight, lut).double(), ones.double() @ dense64(codes, lut, dtype).mT)

    @pytest.mark.parametrize("tokens", [1, 7])
    def test_a_codeword_that_no_input_uses_does_not_reach_the_result(self, tokens):
        codes, _, lut = layer(2, 5, 45)
        codes, x = codes.clamp(min=1), activations(tokens, 45, dtype=torch.float16)
        used = dense64(codes, lut, x.dtype)
        lut[:, 0] = float("inf")  # the code of the padding
        assert_close_to_truth(lut_linear(x, pack_codes(codes, 2), lut), x, used)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_batch_dimensions_and_strides_of_x(self, dtype):
        codes, weight, lut = layer(3, 7, 45)
        dense = dense64(codes, lut, dtype)
        for x in activations_of_all_shapes(dtype).values():
            assert_close_to_truth(lut_linear(x, weight, lut), x, dense)

    @pytest.mark.parametrize("tokens", [1, 3])
    def test_strided_weight_codebook_and_bias(self, tokens):
        codes, weight, lut = layer(2, 7, 45)
        x, bias = activations(tokens, 45, dtype=torch.float32), activations(14, dtype=torch.float32)[::2]
        strided = weight.permute(2, 0, 1).contiguous().permute(1, 2, 0), lut.mT.contiguous().mT
        assert not any(tensor.is_contiguous() for tensor in (*strided, bias))
        dense = dense64(codes, lut, torch.float32)
        assert_close_to_truth(lut_linear(x, *strided, bias), x, dense, bias)
        assert torch.equal(lut_dequantize(*strided, 45, torch.float32).double(), dense)
        # A row slice, as a tensor-parallel shard makes it.
        assert_close_to_truth(lut_linear(x, weight[:, 2:5], lut[2:5], bias[2:5]), x, dense[2:5], bias[2:5])

    @pytest.mark.parametrize("tokens", [1, 3])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_results_do_not_alias_and_every_call_gives_the_same_bits(self, dtype, tokens):
        _, weight, lut = (on_device(tensor) for tensor in layer(2, 9, 300))
        x, bias = (on_device(activations(*shape, dtype=dtype)) for shape in ((tokens, 300), (9,)))
        arguments = (x, weight, lut.to(dtype), bias)
        copies = [tensor.clone() for tensor in arguments]
        for call in (
            lambda: portable.lut_linear(*arguments),
            lambda: portable.lut_dequantize(*arguments[1:3], 300, dtype),
        ):
            first = call()
            kept = first.clone()
            second = call()
            assert torch.equal(first, second)
            second.fill_(float("nan"))
            assert torch.equal(first, kept)
            assert torch.equal(call(), kept)
        assert all(torch.equal(a, b) for a, b in zip(arguments, copies, strict=True))

    def test_nothing_to_sum_and_nothing_to_compute(self):
        weight, lut = torch.zeros(2, 5, 0, dtype=torch.int32), torch.ones(5, 4)
        bias = torch.arange(5.0)
        for tokens in (1, 3):
            assert torch.equal(lut_linear(torch.ones(tokens, 0), weight, lut, bias), bias.expand(tokens, 5))
        assert lut_dequantize(weight, lut, 0, torch.float32).shape == (5, 0)
        assert lut_linear(torch.ones(3, 40), torch.zeros(2, 0, 2, dtype=torch.int32), lut[:0]).shape == (3, 0)

    @pytest.mark.parametrize("bits", range(1, 9))
    @pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
    def test_dequantize_is_a_gather_without_any_error(self, dtype, bits, poisoned):
        for lut_dtype, rows, inputs in ((torch.float16, 1, 1), (torch.float32, 5, 33), (torch.bfloat16, 9, 545)):
            codes, weight, lut = layer(bits, rows, inputs, lut_dtype)
            dense = lut_dequantize(surrounded(weight, -1), lut, inputs, dtype)
            assert dense.dtype == dtype
            assert dense.is_contiguous()
            assert torch.equal(dense.double(), dense64(codes, lut, dtype))

    @pytest.mark.gpu
    def test_more_than_2_31_outputs(self):
        rows, inputs = 65540, 32800  # N K > 2**31
        weight = torch.randint(-(2**31), 2**31, (1, rows, 1025), dtype=torch.int32, device="cuda")
        lut = torch.randn(rows, 2, device="cuda").half()
        dense = portable.lut_dequantize(weight, lut, inputs, torch.float16)
        for part in (slice(0, 9), slice(rows - 9, rows)):
            assert torch.equal(dense[part], reference.lut_dequantize(weight[:, part], lut[part], inputs, dense.dtype))
        del dense
        x = torch.randn(inputs, 40, device="cuda").half()  # M N > 2**31
        result = portable.lut_linear(x, weight[..., :2], lut, None)
        codes = reference.unpack_codes(weight[:, -9:, :2], 40)
        for part in (slice(0, 9), slice(inputs - 9, inputs)):
            truth = dense64(codes.cpu(), lut[-9:].cpu(), x.dtype)
            assert_close_to_truth(result[part, -9:].cpu(), x[part].cpu(), truth)

    @pytest.mark.gpu
    @pytest.mark.parametrize("tokens", [1, 2])
    def test_strides_beyond_2_31(self, tokens):
        far = 2**31
        codes, packed, lut = layer(2, 7, 45)
        weight = torch.empty(far + 64, dtype=torch.int32, device="cuda").as_strided((2, 7, 2), (far, 2, 1))
        x = torch.empty(far + 64, dtype=torch.float16, device="cuda").as_strided((tokens, 45), (far, 1))
        weight.copy_(packed)
        x.copy_(activations(tokens, 45, dtype=torch.float16))
        result = portable.lut_linear(x, weight, lut.cuda(), None)
        assert_close_to_truth(result.cpu(), x.cpu(), dense64(codes, lut, x.dtype))
