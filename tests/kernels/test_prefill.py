"""The kernel for many tokens: that it compiles for Hopper, and on one that it is right."""

import importlib
import re
import subprocess
from pathlib import Path

import pytest
import torch
from test_ops import assert_close_to_truth
from test_tensor_core import problem

pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from hf_guidedquant.triton_kernels import (
    TILED_BITS,
    backend_for,
    lut_dequantize,
    lut_linear_tiled,
    pack_codes,
    pack_tiles,
)
from hf_guidedquant.triton_kernels import prefill_kernel as prefill
from hf_guidedquant.triton_kernels.configs import PrefillConfig
from hf_guidedquant.triton_kernels.tensor_core import _PREFILL

DTYPES = [torch.float16, torch.bfloat16]
# 227 KiB: what a program may have on Hopper.
SHARED_MEMORY = 232_448


def compiled(bits: int, bf16: bool, split: bool):
    """The kernel for sm_90, which takes no GPU."""
    name = "bf16" if bf16 else "fp16"
    chosen = {"BITS": bits, "BF16": bf16, "CONVERT": bf16, "HAS_BIAS": not split, **_PREFILL}
    signature = {
        "inputs": f"tensordesc<{name}[{_PREFILL['TOKENS']},64],{prefill._SWIZZLED.value!r}>",
        "tiles_ptr": "*i32",
        "lut_ptr": "*fp16",
        "bias_ptr": f"*{name}",
        "y_ptr": "*fp32" if split else f"*{name}",
        **dict.fromkeys(("M", "N", "K", "splits"), "i32"),
        **dict.fromkeys(chosen, "constexpr"),
    }
    names = prefill.prefill_kernel.arg_names
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in ("tiles_ptr", "lut_ptr", "bias_ptr", "y_ptr", "N")}
    constants = {(names.index(n),): value for n, value in chosen.items()}
    source = GluonASTSource(prefill.prefill_kernel, signature, constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": _PREFILL["WARPS"]})


@pytest.mark.parametrize(("bf16", "split"), [(False, False), (True, True)])
@pytest.mark.parametrize("bits", TILED_BITS)
def test_it_fits_a_multiprocessor(bits, bf16, split, tmp_path):
    kernel = compiled(bits, bf16, split)
    assert kernel.metadata.shared <= SHARED_MEMORY
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__path__[0]) / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", cubin], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None
    # All eight warps of a program have registers of their own, and nothing is spilled.
    assert int(found[1]) <= 65_536 // (32 * _PREFILL["WARPS"])
    assert int(found[2]) == 0
    # The products are asynchronous; ptxas says so where it cannot keep them so.
    assert kernel.asm["ptx"].count("wgmma.mma_async") == 8


def test_without_gluon_many_tokens_take_a_dense_product(monkeypatch):
    from hf_guidedquant.triton_kernels import tensor_core

    def missing(*_):
        raise ImportError

    monkeypatch.setattr(importlib, "import_module", missing)
    assert tensor_core.prefill.__wrapped__() is None


@pytest.fixture
def _on_hopper():
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("for Hopper")
    assert backend_for(torch.device("cuda:0")) == "tensor_core"


@pytest.mark.gpu
@pytest.mark.usefixtures("_on_hopper")
class TestOnHopper:
    # The last one has more pieces of work than the GPU has multiprocessors.
    @pytest.mark.parametrize(
        ("rows", "inputs", "counts"),
        [(1, 8, (1, 300)), (37, 200, (255, 256)), (200, 1000, (257,)), (136, 4096, (700,)), (20000, 136, (513,))],
    )
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bits", TILED_BITS)
    def test_against_float64_per_element(self, bits, dtype, rows, inputs, counts):
        from hf_guidedquant.triton_kernels.tensor_core import launch

        bias = torch.randn(rows, device="cuda")
        for tokens in counts:
            x, tiles, lut, dense = problem(bits, rows, inputs, tokens, dtype)
            for splits in (1, 3):
                for given in (None, bias):
                    frame = torch.full((tokens * rows + 4096,), torch.nan, device="cuda", dtype=dtype)
                    y = frame[2048:-2048].view(tokens, rows)
                    launch(x, tiles, lut, given, y, PrefillConfig(splits))
                    assert_close_to_truth(y, x, dense, given)
                    assert frame[:2048].isnan().all()
                    assert frame[-2048:].isnan().all()
                again = torch.empty_like(y)
                launch(x, tiles, lut, bias, again, PrefillConfig(splits))
                assert torch.equal(again, y)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_activations_among_others(self, dtype):
        from hf_guidedquant.triton_kernels.tensor_core import _aligned, launch

        x, tiles, lut, dense = problem(3, 300, 1000, 400, dtype)
        for gap in (0, 3):
            frame = torch.full((402, 1016), torch.nan, device="cuda", dtype=dtype)
            view = frame[1:401, gap : gap + 1000].copy_(x)
            y = torch.full((400, 300), torch.nan, device="cuda", dtype=dtype)
            launch(_aligned(view), tiles, lut, None, y, PrefillConfig(2))
            assert_close_to_truth(y, x, dense)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_large_activations_that_cancel(self, dtype):
        from hf_guidedquant.triton_kernels.tensor_core import launch

        rows, inputs, tokens = 20, 512, 300
        codes = torch.arange(inputs).remainder(4).div(2, rounding_mode="floor").to(torch.uint8).expand(rows, inputs)
        weight = pack_codes(codes.contiguous(), 2).cuda()
        lut = torch.tensor([[-1.0, 1.0, 2.0, 3.0]]).half().expand(rows, 4).contiguous().cuda()
        x = torch.full((tokens, inputs), 6e4).to(dtype).cuda()  # pairs sum to 1.2e5, beyond fp16, before they cancel
        x[:, -1] = 3.0
        y = torch.full((tokens, rows), torch.nan, device="cuda", dtype=dtype)
        launch(x, pack_tiles(weight, inputs), lut, None, y, PrefillConfig(1))
        assert_close_to_truth(y, x, lut_dequantize(weight, lut, inputs, dtype).double())

    def test_captured(self):
        from hf_guidedquant.triton_kernels.tensor_core import launch

        x, tiles, lut, dense = problem(2, 300, 1000, 400, torch.float16)
        y = torch.full((400, 300), torch.nan, device="cuda", dtype=torch.float16)
        launch(x, tiles, lut, None, y, PrefillConfig(3))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch(x, tiles, lut, None, y, PrefillConfig(3))
        x.mul_(2)
        graph.replay()
        assert_close_to_truth(y, x, dense)

    @pytest.mark.usefixtures("dense_products_in_fp32")
    def test_the_op_does_without_gluon(self, monkeypatch):
        from hf_guidedquant.triton_kernels import tensor_core
        from hf_guidedquant.triton_kernels.configs import choose

        assert isinstance(choose((9, 0), 2, 1024, 4096, 4096), PrefillConfig)
        x, tiles, lut, dense = problem(2, 4096, 4096, 1024, torch.float16)
        assert_close_to_truth(lut_linear_tiled(x, tiles, lut), x, dense)
        monkeypatch.setattr(tensor_core, "prefill", lambda: None)
        assert_close_to_truth(lut_linear_tiled(x, tiles, lut), x, dense)
