"""The bit-plane layout, bit by bit, and the format built on it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_guidedquant.codes import Codes
from hf_guidedquant.formats import lut
from hf_guidedquant.triton_kernels import pack_codes, unpack_codes, words_per_row

PROPERTY = settings(max_examples=120, deadline=None, derandomize=True)


@st.composite
def coded(draw) -> tuple[torch.Tensor, int]:
    """Codes uint8 ``[N, K]`` of any odd shape, and their bits. Corners (all zeros, all ones) are drawn too."""
    bits, rows, inputs = draw(st.integers(1, 8)), draw(st.integers(1, 9)), draw(st.integers(1, 130))
    fill = draw(st.sampled_from(["random", "zeros", "ones"]))
    if fill == "random":
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
        return torch.randint(2**bits, (rows, inputs), generator=generator, dtype=torch.uint8), bits
    return torch.full((rows, inputs), 2**bits - 1 if fill == "ones" else 0, dtype=torch.uint8), bits


def naive_pack(codes: torch.Tensor, bits: int) -> list:
    """Plane 0 is the least significant bit; bit i of word j is input 32 j + i; the bits past K are 0."""
    planes = []
    for plane in range(bits):
        rows = []
        for row in codes.tolist():
            words = [0] * -(-len(row) // 32)
            for k, code in enumerate(row):
                words[k // 32] |= (code >> plane & 1) << (k % 32)
            rows.append([word - 2**32 if word >= 2**31 else word for word in words])
        planes.append(rows)
    return planes


@PROPERTY
@given(coded())
def test_unpacking_undoes_packing(case):
    codes, bits = case
    unpacked = unpack_codes(pack_codes(codes, bits), codes.shape[1])
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked, codes)


@PROPERTY
@given(coded())
def test_every_bit_is_where_the_contract_says(case):
    codes, bits = case
    before = codes.clone()
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.is_contiguous()
    assert packed.tolist() == naive_pack(codes, bits)
    assert torch.equal(codes, before)


@PROPERTY
@given(coded(), st.integers(0, 2**32 - 1))
def test_garbage_in_the_padding_bits_does_not_reach_the_codes(case, seed):
    codes, bits = case
    inputs = codes.shape[1]
    packed = pack_codes(codes, bits)
    noise = torch.randint(-(2**31), 2**31, packed.shape, generator=torch.Generator().manual_seed(seed))
    padding = 0 if inputs % 32 == 0 else 2**32 - 2 ** (inputs % 32)
    dirty = packed.long() & 0xFFFFFFFF
    dirty[..., -1] |= noise[..., -1] & padding
    assert torch.equal(unpack_codes(torch.where(dirty >= 2**31, dirty - 2**32, dirty).int(), inputs), codes)


def test_worked_example_of_the_layout():
    codes = torch.zeros(1, 33, dtype=torch.uint8)
    codes[0, [0, 1, 31, 32]] = torch.tensor([1, 2, 3, 3], dtype=torch.uint8)
    expected = [[[-(2**31) + 0b01, 1]], [[-(2**31) + 0b10, 1]]]
    assert pack_codes(codes, 2).tolist() == expected


@pytest.mark.parametrize("inputs", [32, 64, 33])
def test_transposed_and_sliced_codes_are_packed_like_their_copy(inputs):
    generator = torch.Generator().manual_seed(inputs)
    transposed = torch.randint(8, (inputs, 6), generator=generator, dtype=torch.uint8).mT
    every_other = torch.randint(8, (6, 2 * inputs), generator=generator, dtype=torch.uint8)[:, ::2]
    for codes in (transposed, every_other, transposed[1:4]):
        assert not codes.is_contiguous()
        assert torch.equal(pack_codes(codes, 3), pack_codes(codes.contiguous(), 3))


def test_strided_planes_are_unpacked_like_their_copy():
    codes = torch.randint(8, (6, 70), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = pack_codes(codes, 3)
    strided = packed.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not strided.is_contiguous()
    assert torch.equal(unpack_codes(strided, 70), codes)
    assert torch.equal(unpack_codes(packed[:, 2:5], 70), codes[2:5])


@pytest.mark.parametrize(("inputs", "words"), [(1, 1), (31, 1), (32, 1), (33, 2), (64, 2), (65, 3), (2**31, 2**26)])
def test_words_per_row(inputs, words):
    assert words_per_row(inputs) == words


@PROPERTY
@given(coded(), st.sampled_from([torch.float16, torch.float32]))
def test_encode_gives_what_declare_promised_and_decode_undoes_it(case, dtype):
    codes, bits = case
    rows, inputs = codes.shape
    codebook = torch.arange(rows * 2**bits, dtype=torch.float32).view(rows, -1).to(dtype)
    original = Codes(codes, codebook)
    assert original.bits == bits
    tensors = lut.encode(original)
    declared = lut.declare(rows, inputs, bits, dtype)
    assert list(tensors) == list(declared)
    for name, tensor in tensors.items():
        assert tuple(tensor.shape) == declared[name].shape
        assert tensor.dtype == declared[name].dtype
        assert tensor.nbytes == declared[name].nbytes
        assert tensor.is_contiguous()
    decoded = lut.decode(tensors, inputs)
    assert torch.equal(decoded.codes, codes)
    assert torch.equal(decoded.codebook, codebook)
    assert decoded.codebook.dtype == dtype


def test_encoding_a_strided_codebook_gives_a_contiguous_tensor():
    codebook = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).mT
    assert lut.encode(Codes(torch.zeros(3, 5, dtype=torch.uint8), codebook))["lut"].is_contiguous()


@pytest.mark.parametrize(
    ("largest", "expected"),
    [
        (0.0, torch.float16),
        (1.0, torch.float16),
        (2.0**-14, torch.float16),  # the smallest normal fp16
        (2.0**-14 * (1 - 2.0**-20), torch.float32),
        (1e-30, torch.float32),
        (2.0**15, torch.float16),  # half the fp16 range, so that a fitted codebook may overshoot the weights
        (2.0**15 + 1, torch.float32),
        (1e30, torch.float32),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_codebook_dtype_is_fp16_unless_the_largest_weight_does_not_fit(largest, expected, sign):
    weight = torch.zeros(3, 5)
    weight[1, 2] = sign * largest
    assert lut.codebook_dtype(weight) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_codebook_dtype_reads_any_float_dtype(dtype):
    assert lut.codebook_dtype(torch.full((2, 2), 0.02, dtype=dtype)) == torch.float16
    if dtype != torch.float16:
        assert lut.codebook_dtype(torch.full((2, 2), 1e10, dtype=dtype)) == torch.float32
