"""Timing of small GPU kernels: CUDA graphs, medians, weights rotated beyond L2."""

from collections.abc import Callable, Sequence

import torch

# Copies of a matrix to rotate over: together several times an L2.
ROTATION_BYTES = 160_000_000


def copies(nbytes: int) -> int:
    """How many copies of a matrix a rotation takes."""
    return max(2, -(-ROTATION_BYTES // nbytes))


def graph_time(calls: Sequence[Callable[[], object]], replays: int = 12) -> float:
    """Median microseconds per call of a CUDA graph that makes all calls, at least 24 in all."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    rounds = max(1, -(-24 // len(calls)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    times = []
    for _ in range(replays + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / (rounds * len(calls)))
    return sorted(times[1:])[replays // 2]


def read_bandwidth() -> float:
    """Bytes per second of a reduction over 2 GB."""
    data = torch.ones(1 << 30, dtype=torch.float16, device="cuda")
    return data.nbytes / (graph_time([lambda: torch.amax(data)], 8) * 1e-6)


def random_layer(bits: int, rows: int, inputs: int, count: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Tiles of ``count`` random matrices ``[rows, inputs]`` and a codebook for all of them."""
    shape = (count, -(-rows // 16), -(-inputs // 128), 64 * bits)
    tiles = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device="cuda")
    lut = torch.randn(rows, 2**bits, device="cuda").mul(0.02).sort(dim=-1).values.half()
    return list(tiles), lut


def random_overlay(rows: int, inputs: int, outliers: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and columns of so many outliers in every row."""
    columns = torch.rand(rows, inputs, device="cuda").topk(outliers).indices.sort(dim=-1).values
    return torch.randn(rows, outliers, device="cuda").half(), columns.to(torch.int16)
