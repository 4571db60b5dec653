"""That the kernels compile for GPUs of many kinds, and fit them. It takes none of them."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from interpreter import not_interpreted
from torch import Tensor

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from hf_guidedquant.nn import code_sums_kernel
from hf_guidedquant.solvers import descent
from hf_guidedquant.triton_kernels import TILED_BITS, attention, portable, sparse, tensor_core
from hf_guidedquant.triton_kernels.configs import MatrixConfig, choose, table

# Bytes of shared memory that a program may have.
SHARED_MEMORY = {
    "sm_75": 64 * 1024,  # T4, RTX 2080
    "sm_86": 99 * 1024,  # RTX 3090, A10; an RTX 4090 has as much, an A100 more
    "sm_90": 227 * 1024,  # H100, H200
    "sm_120": 99 * 1024,  # RTX 5090
    "gfx942": 64 * 1024,  # MI300
    "gfx1100": 64 * 1024,  # RX 7900
}

pytestmark = not_interpreted


@dataclass(frozen=True)
class Absent:
    """A driver for Triton of a GPU that is not there: good enough to compile for it."""

    name: str

    def get_current_target(self) -> GPUTarget:
        if self.name.startswith("sm_"):
            return GPUTarget("cuda", int(self.name[3:]), 32)
        return GPUTarget("hip", self.name, 64 if self.name.startswith("gfx9") else 32)

    def get_current_device(self) -> str:
        return self.name

    def get_current_stream(self, device: str) -> int:
        return 0


def overlapping(name: str) -> bool:
    """Whether kernels of a GPU can begin before the one before has ended."""
    return name.startswith("sm_") and int(name[3:]) >= 90


@pytest.fixture
def compile_for(monkeypatch) -> Callable[[str], list]:
    """Launches compile for an absent GPU from then on, and nothing runs; the list gets what was compiled."""

    def absent(name: str) -> list:
        launch, compiled = JITFunction.run, []

        def compile_only(self, *args, warmup, **kwargs):
            compiled.append(launch(self, *args, warmup=True, **kwargs))

        monkeypatch.setattr(driver, "_active", Absent(name))
        for module in (attention, sparse):
            monkeypatch.setattr(module, "overlaps", lambda device: overlapping(name))
        monkeypatch.setattr(JITFunction, "run", compile_only)
        return compiled

    return absent


def assert_fit(compiled: list, name: str) -> None:
    assert compiled
    for kernel in compiled:
        assert kernel.asm["cubin" if name.startswith("sm_") else "hsaco"]
        assert kernel.metadata.shared <= SHARED_MEMORY[name]


def packed(bits: int) -> tuple[Tensor, Tensor]:
    """Bit-planes and codebooks of a layer 1000 x 4096."""
    return torch.zeros(bits, 1000, 128, dtype=torch.int32), torch.zeros(1000, 2**bits, dtype=torch.float16)


@pytest.mark.parametrize("name", SHARED_MEMORY)
class TestPlainTriton:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_products(self, name, dtype, compile_for):
        compiled = compile_for(name)
        for tokens in (1, 32):
            portable.lut_linear(torch.zeros(tokens, 4096, dtype=dtype), *packed(3), None)
        portable.lut_dequantize(*packed(8), 4096, dtype)
        overlay = torch.zeros(1000, 19, dtype=dtype), torch.zeros(1000, 19, dtype=torch.int16)
        for tokens in (1, 64):
            sparse.add_product(torch.zeros(tokens, 1000, dtype=dtype), torch.zeros(tokens, 4096, dtype=dtype), *overlay)
        sparse.add_to_dense(torch.zeros(1000, 4096, dtype=dtype), *overlay)
        assert_fit(compiled, name)

    def test_solver_and_training(self, name, compile_for):
        compiled = compile_for(name)
        square, column, rows = torch.zeros(1, 256, 256), torch.zeros(1, 256), torch.zeros(1, 256, 64)
        descent.descend(square, column, rows, rows, torch.zeros(1, 4, 64), slice(0, descent.BLOCK), 0)
        code_sums_kernel.sums_by_code(torch.zeros(64, 256), torch.zeros(3, 64, 8, dtype=torch.int32), 8)
        assert_fit(compiled, name)


@pytest.mark.parametrize("name", [name for name in SHARED_MEMORY if name != "sm_75"])
def test_attention_of_the_widest_heads(name, compile_for):
    compiled = compile_for(name)
    query, key = torch.zeros(2, 8, 1, 256).half(), torch.zeros(2, 2, 200, 256).half()
    attention.decode_attention(query, key, key, torch.ones(2, 1, 1, 200, dtype=torch.bool), 1.0)
    assert_fit(compiled, name)


@pytest.mark.parametrize("name", ["sm_86", "sm_90"])
def test_attention_reads_only_after_it_has_waited_for_the_kernels_before(name, compile_for):
    compiled = compile_for(name)
    query, key = torch.zeros(1, 8, 1, 64).half(), torch.zeros(1, 2, 200, 64).half()
    attention.decode_attention(query, key, key, None, 1.0)
    for kernel in compiled:
        before, wait, after = kernel.asm["ptx"].partition("griddepcontrol.wait")
        assert bool(wait) == overlapping(name)
        assert "griddepcontrol.launch_dependents" not in before
        assert not wait or ("ld.global" not in before and "ld.global" in after)


@pytest.mark.parametrize("name", ["sm_86", "sm_90", "sm_120"])
@pytest.mark.parametrize("bits", TILED_BITS)
def test_tensor_core_kernels(name, bits, compile_for):
    compiled, capability = compile_for(name), divmod(int(name[3:]), 10)
    for dtype, tokens in ((torch.float16, 1), (torch.bfloat16, 8)):
        x, y = torch.zeros(tokens, 4096, dtype=dtype), torch.zeros(tokens, 1000, dtype=dtype)
        tiles = torch.zeros(63, 32, 64 * bits, dtype=torch.int32)
        tensor_core.launch(x, tiles, packed(bits)[1], None, y, choose(capability, bits, tokens, 1000, 4096))
    tensor_core.dequantize(tiles, packed(bits)[1], 4096, torch.bfloat16)
    assert_fit(compiled, name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", TILED_BITS)
def test_no_product_of_the_matrix_kernel_reads_registers_that_are_written_again(bits, dtype, compile_for):
    compiled = compile_for("sm_90")
    x, y = torch.zeros(64, 4096, dtype=dtype), torch.zeros(64, 1000, dtype=dtype)
    tiles = torch.zeros(63, 32, 64 * bits, dtype=torch.int32)
    configs = {config for shapes in table()[bits].values() for config in shapes.values()}
    for config in {config._replace(splits=1) for config in configs if isinstance(config, MatrixConfig)}:
        tensor_core.launch(x, tiles, packed(bits)[1], None, y, config)
    assert_fit(compiled, "sm_90")
    for kernel in compiled:
        ptx = kernel.asm["ptx"]
        assert "wgmma.mma_async" in ptx
        # Whoever waits, waits for all products: none is under way when the next weights are decoded.
        assert set(re.findall(r"wgmma.wait_group.sync.aligned (\d+)", ptx)) == {"0"}
