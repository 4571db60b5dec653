"""The tensor-core kernels on a GPU, against float64 per element."""

import threading

import pytest
import torch
from test_ops import assert_close_to_truth, layer

from hf_guidedquant.triton_kernels import (
    OPS_NAMESPACE,
    TILED_BITS,
    backend_for,
    lut_dequantize,
    lut_dequantize_tiled,
    lut_linear_tiled,
    pack_tiles,
    set_backend,
    unpack_tiles,
)
from hf_guidedquant.triton_kernels.configs import Config, MatrixConfig, table

pytestmark = pytest.mark.gpu
OPS = getattr(torch.ops, OPS_NAMESPACE)
DTYPES = [torch.float16, torch.bfloat16]
TOKENS = [1, 2, 7, 8, 9, 16, 33, 64, 65]
SHAPES = [(1, 1), (5, 33), (37, 200), (70, 1000), (576, 1536), (100, 4864), (33, 8961)]


@pytest.fixture(autouse=True)
def _tensor_core_only():
    if not torch.cuda.is_available() or backend_for(torch.device("cuda:0")) != "tensor_core":
        pytest.skip("needs the tensor-core backend")


def problem(bits, rows, inputs, tokens, dtype, lut_dtype=torch.float16, scale=1.0):
    """Activations, tiles and codebook on the GPU, and the dense matrix in float64."""
    _, weight, lut = layer(bits, rows, inputs, lut_dtype)
    weight, lut = weight.cuda(), lut.cuda()
    x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(tokens)).mul(scale).to(dtype).cuda()
    return x, pack_tiles(weight, inputs), lut, lut_dequantize(weight, lut, inputs, dtype).double()


@pytest.mark.usefixtures("dense_products_in_fp32")
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", TILED_BITS)
def test_linear_against_float64(bits, dtype, tokens):
    for rows, inputs in SHAPES:
        x, tiles, lut, dense = problem(bits, rows, inputs, tokens, dtype)
        bias = torch.randn(rows, device="cuda")
        assert_close_to_truth(lut_linear_tiled(x, tiles, lut), x, dense)
        assert_close_to_truth(lut_linear_tiled(x, tiles, lut, bias), x, dense, bias)


@pytest.mark.usefixtures("dense_products_in_fp32")
@pytest.mark.parametrize("lut_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("tokens", [1, 33, 300])
def test_codebooks_of_other_dtypes_and_fp32_activations(dtype, lut_dtype, tokens):
    x, tiles, lut, dense = problem(3, 70, 1000, tokens, dtype, lut_dtype)
    assert_close_to_truth(lut_linear_tiled(x, tiles, lut), x, dense)


@pytest.mark.usefixtures("dense_products_in_fp32")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", TILED_BITS)
def test_many_tokens_go_through_dense_chunks(bits, dtype, monkeypatch):
    from hf_guidedquant.triton_kernels import tensor_core

    monkeypatch.setattr(tensor_core, "_DENSE_ROWS", 48)
    for rows, inputs in ((160, 1000), (100, 1001)):
        x, tiles, lut, dense = problem(bits, rows, inputs, 1500, dtype)
        bias = torch.randn(rows, device="cuda", dtype=dtype)
        assert_close_to_truth(lut_linear_tiled(x, tiles, lut), x, dense)
        assert_close_to_truth(lut_linear_tiled(x, tiles, lut, bias), x, dense, bias)


def launches(bits):
    """The table's launches of a width, each with the largest number of tokens it is for."""
    found = {}
    for tokens, shapes in table().get(bits, {}).items():
        for config in shapes.values():
            if config is not None:
                found[config] = max(tokens, found.get(config, 0))
    return list(found.items())


@pytest.mark.parametrize("share", range(8))
@pytest.mark.parametrize("bits", TILED_BITS)
def test_every_launch_in_the_table_writes_all_of_its_result_and_nothing_else(bits, share):
    """In shares, because every launch is compiled."""
    from hf_guidedquant.triton_kernels.tensor_core import launch

    for config, tokens in launches(bits)[share::8]:
        for rows, inputs in ((37, 264), (112, 128 * 8 * getattr(config, "warps", 8))):
            x, tiles, lut, dense = problem(bits, rows, inputs, tokens, torch.float16)
            frame = torch.full((tokens * rows + 4096,), torch.nan, device="cuda", dtype=torch.float16)
            y = frame[2048:-2048].view(tokens, rows)
            launch(x, tiles, lut, None, y, config)
            assert_close_to_truth(y, x, dense)
            assert frame[:2048].isnan().all(), config
            assert frame[-2048:].isnan().all(), config
        assert repeats_itself_on_a_busy_gpu(bits, min(tokens, 512), config), config


def repeats_itself_on_a_busy_gpu(bits, tokens, config):
    """What a kernel does not wait for is late only now and then, and hardly ever on a GPU that is idle."""
    from hf_guidedquant.triton_kernels.tensor_core import launch

    x, tiles, lut, dense = problem(bits, 4096, 4096, tokens, torch.float16)
    results = [torch.empty(tokens, 4096, device="cuda", dtype=torch.float16) for _ in range(40)]
    beside, busy = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda").half()
    beside.wait_stream(torch.cuda.current_stream())
    for y in results:
        with torch.cuda.stream(beside):
            torch.mm(busy, busy[:, :2048])
        launch(x, tiles, lut, None, y, config)
    torch.cuda.synchronize()
    assert_close_to_truth(results[0], x, dense)
    return all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", TILED_BITS)
def test_matrix_kernel_against_float64(bits, dtype):
    from hf_guidedquant.triton_kernels.tensor_core import launch

    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("for Hopper")
    configs = [
        MatrixConfig(4, 16, 3, 1),
        MatrixConfig(8, 32, 4, 2),
        MatrixConfig(4, 64, 4, 16),
        MatrixConfig(4, 128, 3, 3),
    ]
    for config in configs:
        for rows, inputs in ((1, 8), (37, 200), (200, 1000), (136, 4096)):
            for tokens in (1, 16, 33, 130):
                x, tiles, lut, dense = problem(bits, rows, inputs, tokens, dtype)
                bias = torch.randn(rows, device="cuda")
                for given in (None, bias):
                    frame = torch.full((tokens * rows + 4096,), torch.nan, device="cuda", dtype=dtype)
                    y = frame[2048:-2048].view(tokens, rows)
                    launch(x, tiles, lut, given, y, config)
                    assert_close_to_truth(y, x, dense, given)
                    assert frame[:2048].isnan().all()
                    assert frame[-2048:].isnan().all()
                again = torch.empty_like(y)
                launch(x, tiles, lut, bias, again, config)
                assert torch.equal(again, y)


@pytest.mark.parametrize("inputs", [200, 203])
def test_nan_around_the_activations_does_not_leak(inputs):
    x, tiles, lut, dense = problem(2, 37, inputs, 5, torch.float16)
    for gap in (8, 3):
        frame = torch.full((7, inputs + gap), torch.nan, device="cuda", dtype=torch.float16)
        view = frame[1:6, :inputs].copy_(x)
        assert_close_to_truth(lut_linear_tiled(view, tiles, lut), x, dense)
    odd_start = (
        torch.full((5 * inputs + 1,), torch.nan, device="cuda", dtype=torch.float16)[1:].view(5, inputs).copy_(x)
    )
    assert_close_to_truth(lut_linear_tiled(odd_start, tiles, lut), x, dense)
    assert_close_to_truth(lut_linear_tiled(x.mT.contiguous().mT, tiles, lut), x, dense)
    assert_close_to_truth(lut_linear_tiled(x.expand(2, 3, 5, inputs), tiles, lut), x.expand(2, 3, 5, inputs), dense)


@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_activations_that_cancel_and_tiny_ones(dtype, tokens):
    rows, inputs = 20, 512
    codes = torch.arange(inputs).remainder(4).div(2, rounding_mode="floor").to(torch.uint8).expand(rows, inputs)
    from hf_guidedquant.triton_kernels import pack_codes

    tiles = pack_tiles(pack_codes(codes.contiguous(), 2), inputs).cuda()
    lut = torch.tensor([[-1.0, 1.0, 2.0, 3.0]]).half().expand(rows, 4).contiguous().cuda()
    x = torch.full((tokens, inputs), 6e4).to(dtype).cuda()  # pairs sum to 1.2e5, beyond fp16, before they cancel
    x[:, -1] = 3.0
    dense = lut_dequantize_tiled(tiles, lut, inputs, dtype).double()
    assert_close_to_truth(lut_linear_tiled(x, tiles, lut), x, dense)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    x = torch.full((tokens, inputs), smallest, dtype=torch.float64).to(dtype).cuda()
    result = lut_linear_tiled(x, tiles, lut)
    assert torch.equal(result.double(), x.double() @ dense.mT)  # whole multiples of the smallest subnormal
    lut = (lut.double() * 2.0**-24).half()
    dense = lut_dequantize_tiled(tiles, lut, inputs, dtype).double()
    assert (dense != 0).all()
    ones = torch.ones(tokens, inputs, dtype=dtype, device="cuda")
    assert torch.equal(lut_linear_tiled(ones, tiles, lut).double(), ones.double() @ dense.mT)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("bits", TILED_BITS)
def test_dequantize_is_exact(bits, dtype):
    for rows, inputs in SHAPES:
        _, weight, lut = layer(bits, rows, inputs)
        dense = lut_dequantize_tiled(pack_tiles(weight.cuda(), inputs), lut.cuda(), inputs, dtype)
        assert dense.is_contiguous()
        assert torch.equal(dense.cpu(), lut_dequantize(weight, lut, inputs, dtype))


def test_results_are_functions_of_the_inputs_alone():
    for tokens in (1, 8, 33):
        x, tiles, lut, _ = problem(3, 576, 1536, tokens, torch.float16)
        first = lut_linear_tiled(x, tiles, lut)
        kept = first.clone()
        results = [lut_linear_tiled(x, tiles, lut) for _ in range(50)]
        assert all(torch.equal(result, kept) for result in results)
        assert torch.equal(first, kept)
        assert len({result.data_ptr() for result in results}) == 50


def test_streams_and_threads():
    x, tiles, lut, _ = problem(2, 576, 1536, 1, torch.float16)
    expected = lut_linear_tiled(x, tiles, lut)
    torch.cuda.synchronize()
    wrong = []

    def work():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(200):
                y = lut_linear_tiled(x, tiles, lut)
                if not torch.equal(y, expected):
                    wrong.append(y)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_chain_of_dependent_products_is_in_order():
    # Every product overlaps with the one before it, whose result it needs.
    _, tiles, lut, _ = problem(2, 512, 512, 1, torch.float16)
    lut = lut * 0.04
    x = torch.randn(1, 512, device="cuda").half()
    graph, static = torch.cuda.CUDAGraph(), x.clone()

    def chain(y, product):
        for _ in range(30):
            y = product(y)
            y = y / y.abs().max()
        return y

    eager = chain(x, lambda y: lut_linear_tiled(y, tiles, lut))
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        replayed = chain(static, lambda y: lut_linear_tiled(y, tiles, lut))
    for _ in range(20):
        replayed.fill_(torch.nan)
        graph.replay()
        assert torch.equal(replayed, eager)

    def pure(y):
        for _ in range(30):
            y = lut_linear_tiled(y, tiles, lut)
        return y

    y = x
    for _ in range(30):
        y = lut_linear_tiled(y, tiles, lut)
        torch.cuda.synchronize()
    for _ in range(20):
        assert torch.equal(pure(x), y)


def test_graphs_compile_and_opcheck():
    x, tiles, lut, _ = problem(3, 576, 1536, 1, torch.float16)
    bias = torch.randn(576, device="cuda")
    expected = lut_linear_tiled(x, tiles, lut, bias)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = lut_linear_tiled(x, tiles, lut, bias)
    y.fill_(torch.nan)
    graph.replay()
    assert torch.equal(y, expected)
    compiled = torch.compile(lambda x: lut_linear_tiled(torch.relu(x), tiles, lut, bias) * 2, fullgraph=True)
    assert torch.equal(compiled(x), lut_linear_tiled(torch.relu(x), tiles, lut, bias) * 2)
    torch.library.opcheck(OPS.lut_linear_tiled.default, (x.float().half().requires_grad_(), tiles, lut, bias))
    torch.library.opcheck(OPS.lut_dequantize_tiled.default, (tiles, lut, 1536, torch.bfloat16))


def test_gradient_of_the_activations():
    x, tiles, lut, dense = problem(4, 70, 1000, 5, torch.bfloat16)
    x.requires_grad_()
    upstream = torch.randn(5, 70, device="cuda").bfloat16()
    (gradient,) = torch.autograd.grad(lut_linear_tiled(x, tiles, lut), x, upstream)
    assert_close_to_truth(gradient, upstream, dense.mT)


def test_more_than_two_to_the_31_weights():
    rows, inputs = 2**17 + 16, 2**14
    tiles = torch.randint(-(2**31), 2**31 - 1, (rows // 16, inputs // 128, 128), dtype=torch.int32, device="cuda")
    lut = torch.randn(rows, 4, device="cuda").half()
    for tokens in (1, 40):
        x = torch.randn(tokens, inputs, device="cuda").half()
        y = lut_linear_tiled(x, tiles, lut)
        for part in (slice(0, 16), slice(-32, None)):
            those = slice(part.start // 16, part.stop and part.stop // 16)
            planes = unpack_tiles(tiles[those], lut[part].shape[0], inputs)
            assert_close_to_truth(y[:, part], x, lut_dequantize(planes, lut[part], inputs, torch.float16).double())


def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, tiles, lut, dense = problem(2, 576, 1536, 3, torch.float16)
    x, tiles, lut, dense = (t.to("cuda:1") for t in (x, tiles, lut, dense))
    for tokens in (1, 3):
        y = lut_linear_tiled(x[:tokens], tiles, lut)
        assert y.device == x.device
        assert_close_to_truth(y, x[:tokens], dense)
    assert_close_to_truth(lut_linear_tiled(x.repeat(200, 1), tiles, lut), x.repeat(200, 1), dense)


def test_backends_can_be_chosen(monkeypatch):
    device = torch.device("cuda:0")
    x, tiles, lut, dense = problem(2, 70, 1000, 2, torch.float16)
    try:
        for name in ("triton", "torch", "tensor_core", "auto"):
            set_backend(name)
            assert backend_for(device) == ("tensor_core" if name == "auto" else name)
            assert_close_to_truth(lut_linear_tiled(x, tiles, lut), x, dense)
    finally:
        set_backend("auto")


def test_the_self_test_notices_a_wrong_result(monkeypatch):
    from hf_guidedquant.triton_kernels import tensor_core

    assert tensor_core.works(torch.device("cuda:0"))
    right = tensor_core.launch

    def wrong(x, tiles, lut, bias, y, config: Config):
        right(x, tiles, lut, bias, y, config)
        y[:, 8:16] = y[:, 8:16].flip(1)

    monkeypatch.setattr(tensor_core, "launch", wrong)
    assert not tensor_core.works(torch.device("cuda:0"))
