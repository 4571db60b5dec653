"""The product with many tokens on Hopper, in Gluon: decoded weights go through shared memory to asynchronous ``wgmma``.

While the tensor cores multiply 64 inputs, the warps decode the next 64, and the TMA brings the activations after
those. Programs stay, one for every multiprocessor, and go from one piece of the output to the next, whose activations
are under way before the last one is stored. Gluon states every layout, so nothing here rests on what Triton happens to
do.
"""
# mypy: ignore-errors
# (Gluon's compiler, not Python, runs most of this file.)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .prmt import decode_half, split4
from .tile_kernels import load_codebook

# Another name since Triton 3.7.
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
# How 16-bit numbers lie in shared memory, 64 in a row.
_SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
# The same, two numbers at a time.
_SWIZZLED_PAIRS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2))
# Tokens that are stored at a time.
_STORED = gl.constexpr(64)


def describe_inputs(x, tokens: int) -> TensorDescriptor:
    """Activations ``[M, K]`` for the TMA: 64 inputs of so many tokens at a time, and 0 past the end."""
    return TensorDescriptor(x, [*x.shape], [*x.stride()], [tokens, 64], _SWIZZLED.value)


@gluon.jit
def _load_vector(pointers, LENGTH: gl.constexpr, WARPS: gl.constexpr):
    """LENGTH words from each thread's pointer: ``[threads, LENGTH]``."""
    VECTOR: gl.constexpr = gl.BlockedLayout([1, LENGTH], [32, 1], [WARPS, 1], [1, 0])
    start = gl.convert_layout(pointers, gl.SliceLayout(1, VECTOR), assert_trivial=True)
    word = gl.arange(0, LENGTH, layout=gl.SliceLayout(0, VECTOR))
    return gl.load(gl.expand_dims(start, 1) + gl.expand_dims(word, 0))


@gluon.jit
def _by_thread(values, WARPS: gl.constexpr):
    """Columns of such vectors in the layout of one element per thread, in which they are already."""
    THREADS: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    found = ()
    for i in gl.static_range(len(values)):
        found = found + (gl.convert_layout(values[i], THREADS, assert_trivial=True),)
    return found


@gluon.jit
def _load_tile(tile_ptr, lane, BITS: gl.constexpr, WARPS: gl.constexpr):
    """A lane's words of one tile: those of row g, and those of row g + 8."""
    first = _by_thread(split4(_load_vector(tile_ptr + lane * 4, 4, WARPS)), WARPS)
    if BITS == 2:
        return (first[0], first[1]), (first[2], first[3])
    elif BITS == 3:
        third = _by_thread(gl.split(_load_vector(tile_ptr + 128 + lane * 2, 2, WARPS)), WARPS)
        return (first[0], first[1], third[0]), (first[2], first[3], third[1])
    else:
        return first, _by_thread(split4(_load_vector(tile_ptr + 128 + lane * 4, 4, WARPS)), WARPS)


@gluon.jit
def _decode(words, top, bottom, HALF: gl.constexpr, BITS: gl.constexpr, WARPS: gl.constexpr):
    """The weights of half a block, two in an int32: ``[16 * WARPS, 32]``.

    The rows of every eight stand in the order 0 2 4 6 1 3 5 7: so lanes that store together meet different banks.
    """
    upper, lower = decode_half(words[0], top, HALF, BITS, True), decode_half(words[1], bottom, HALF, BITS, True)
    rows = ()
    for i in gl.static_range(8):
        rows = rows + (gl.join(upper[i], lower[i]),)
    parts = ()
    for i in gl.static_range(4):
        parts = parts + (gl.join(rows[i], rows[i + 4]),)
    pairs = gl.join(gl.join(parts[0], parts[2]), gl.join(parts[1], parts[3]))
    # warp, three bits of g, t, half of the tile, p, j -> warp, half of the tile, g with its last bit first, p, t, j
    pairs = gl.permute(gl.reshape(pairs, [WARPS, 2, 2, 2, 4, 2, 2, 4]), (0, 5, 3, 1, 2, 6, 4, 7))
    return gl.reshape(pairs, [16 * WARPS, 32])


@gluon.jit
def _place(work, M, N, blocks, share, ROWS: gl.constexpr, TOKENS: gl.constexpr):
    """Of a piece of work: its first row, first token, split, first block of 128 inputs, and how many blocks."""
    row_blocks, token_blocks = gl.cdiv(N, ROWS), gl.cdiv(M, TOKENS)
    others = work // row_blocks
    split = others // token_blocks
    begin = split * share
    return work % row_blocks * ROWS, others % token_blocks * TOKENS, split, begin, gl.minimum(share, blocks - begin)


@gluon.jit
def _load_weights(
    work, tiles_ptr, lut_ptr, lane, warp, M, N, blocks, share,
    BITS: gl.constexpr, TOKENS: gl.constexpr, WARPS: gl.constexpr, CONVERT: gl.constexpr,
):  # fmt: skip
    """Where a warp's tiles of a piece of work begin, the words of the first one, and the codebooks of its rows."""
    first_row, _, _, begin, _ = _place(work, M, N, blocks, share, 16 * WARPS, TOKENS)
    # A tile past the last one repeats it; its rows are never stored.
    tile = gl.minimum(first_row // 16 + warp, gl.cdiv(N, 16) - 1)
    row = tile * 16 + lane // 4
    tile_ptr = tiles_ptr + (tile.to(gl.int64) * blocks + begin) * (64 * BITS)
    words = _load_tile(tile_ptr, lane, BITS, WARPS)
    top = load_codebook(lut_ptr, gl.minimum(row, N - 1), BITS, CONVERT, True)
    bottom = load_codebook(lut_ptr, gl.minimum(row + 8, N - 1), BITS, CONVERT, True)
    return tile_ptr, words, top, bottom


@gluon.jit
def _fetch(
    inputs, x, arrived, stage, work, token, column, left, works, M, N, blocks, share,
    ROWS: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    """Begin to fetch 64 inputs of some activations; returns which come next, and how many times 64 after those."""
    exists = work < works
    mbarrier.expect(arrived.index(stage), TOKENS * 128, pred=exists)
    tma.async_copy_global_to_shared(inputs, [token, column], arrived.index(stage), x.index(stage), pred=exists)
    column += 64
    left -= 1
    if left == 0:
        work += gl.num_programs(0)
        _, token, _, begin, count = _place(work, M, N, blocks, share, ROWS, TOKENS)
        column = begin * 128
        left = count * 2
    return work, token, column, left


@gluon.jit
def _halves(sums):
    """``[rows, tokens]`` -> the first and the second half of the tokens."""
    ROWS: gl.constexpr = sums.shape[0]
    HALF: gl.constexpr = sums.shape[1] // 2
    return gl.split(gl.permute(gl.reshape(sums, [ROWS, 2, HALF]), (0, 2, 1)))


@gluon.jit
def _store(sums, out, y_ptr, first_row, first_token, line, M, N, WARPS: gl.constexpr):
    """Store sums ``[rows, tokens]``; ``line`` is the row of y that token 0 has."""
    ROWS: gl.constexpr = sums.shape[0]
    TOKENS: gl.constexpr = sums.shape[1]
    if TOKENS > _STORED:
        first, second = _halves(sums)
        _store(first, out, y_ptr, first_row, first_token, line, M, N, WARPS)
        _store(second, out, y_ptr, first_row, first_token + TOKENS // 2, line, M, N, WARPS)
    else:
        VECTOR: gl.constexpr = gl.BlockedLayout([8, 1], [ROWS // 8, 256 // ROWS], [1, WARPS], [0, 1])
        _barrier()
        out.store(sums.to(y_ptr.dtype.element_ty))
        _barrier()
        # From the order of _decode to that of the matrix, which moves nothing between threads.
        ordered = gl.permute(gl.reshape(out.load(VECTOR), [ROWS // 8, 2, 2, 2, TOKENS]), (0, 2, 3, 1, 4))
        values = gl.convert_layout(gl.reshape(ordered, [ROWS, TOKENS]), VECTOR)
        row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, VECTOR))
        token = first_token + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, VECTOR))
        target = y_ptr + gl.expand_dims((line + token).to(gl.int64) * N, 0) + gl.expand_dims(row, 1)
        gl.store(target, values, gl.expand_dims(row < N, 1) & gl.expand_dims(token < M, 0))


@gluon.jit(do_not_specialize=["M", "K", "splits"])
def prefill_kernel(
    inputs, tiles_ptr, lut_ptr, bias_ptr, y_ptr, M, N, K, splits,
    BITS: gl.constexpr, TOKENS: gl.constexpr, WARPS: gl.constexpr, STAGES: gl.constexpr, BF16: gl.constexpr,
    CONVERT: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """``y[splits, M, N]``, which add up to ``x[M, K] @ W.T + bias``.

    A piece of work is 16 WARPS rows, TOKENS tokens and one split of the blocks of 128 inputs. Every warp decodes the
    tiles of its 16 rows.

    Args:
        inputs: x, as :func:`describe_inputs` has it.
        lut_ptr: ``[N, 2**BITS]`` in the dtype of x, or (CONVERT) fp16 beside bf16 activations.
        y_ptr: In the dtype of x; of several splits fp32.
        splits: At most so many that each has a block.
        STAGES: Parts of 64 inputs that have room in shared memory, 3 at least.
    """
    ROWS: gl.constexpr = 16 * WARPS
    THREADS: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, TOKENS, 16]
    )
    WIDTH: gl.constexpr = y_ptr.dtype.element_ty.primitive_bitwidth
    OUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=WIDTH, rank=2, transposed=True)
    dtype: gl.constexpr = gl.bfloat16 if BF16 else gl.float16

    thread = gl.arange(0, 32 * WARPS, layout=THREADS)
    lane, warp = thread % 32, thread // 32
    blocks = gl.cdiv(K, 128)
    share = gl.cdiv(blocks, splits)
    works = gl.cdiv(N, ROWS) * gl.cdiv(M, TOKENS) * splits
    first_work = gl.program_id(0)

    x = gl.allocate_shared_memory(dtype, [STAGES, TOKENS, 64], _SWIZZLED)
    weights = gl.allocate_shared_memory(dtype, [2, ROWS, 64], _SWIZZLED)
    weight_pairs = weights._reinterpret(gl.int32, [2, ROWS, 32], _SWIZZLED_PAIRS)
    out = gl.allocate_shared_memory(y_ptr.dtype.element_ty, [ROWS, _STORED], OUT)
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(arrived.index(i), count=1)
    fence_async_shared()
    _barrier()

    coming = first_work
    _, token, _, begin, count = _place(coming, M, N, blocks, share, ROWS, TOKENS)
    column = begin * 128
    left = count * 2
    for i in gl.static_range(STAGES - 1):
        coming, token, column, left = _fetch(
            inputs, x, arrived, i, coming, token, column, left, works, M, N, blocks, share, ROWS, TOKENS
        )
    tile_ptr, words, top, bottom = _load_weights(
        first_work, tiles_ptr, lut_ptr, lane, warp, M, N, blocks, share, BITS, TOKENS, WARPS, CONVERT
    )
    stage = 0
    phase = 0
    for work in range(first_work, works, gl.num_programs(0)):
        first_row, first_token, split, _, count = _place(work, M, N, blocks, share, ROWS, TOKENS)
        weight_pairs.index(0).store(_decode(words, top, bottom, 0, BITS, WARPS))
        fence_async_shared()
        _barrier()
        sums = warpgroup_mma_init(gl.zeros([ROWS, TOKENS], gl.float32, layout=SUMS))
        for block in range(count):
            # The last block is read again instead of one past the end.
            tile_ptr += gl.where(block + 1 < count, 64 * BITS, 0)
            ahead = _load_tile(tile_ptr, lane, BITS, WARPS)
            for HALF in gl.static_range(2):
                mbarrier.wait(arrived.index(stage), phase)
                sums = warpgroup_mma(weights.index(HALF), x.index(stage).permute((1, 0)), sums, is_async=True)
                # Now the half before is multiplied, and its weights and activations may be overwritten.
                sums = warpgroup_mma_init(warpgroup_mma_wait(1, [sums]))
                if HALF == 0:
                    following = _decode(words, top, bottom, 1, BITS, WARPS)
                else:
                    following = _decode(ahead, top, bottom, 0, BITS, WARPS)
                _barrier()
                free = gl.where(stage == 0, STAGES - 1, stage - 1)
                coming, token, column, left = _fetch(
                    inputs, x, arrived, free, coming, token, column, left, works, M, N, blocks, share, ROWS, TOKENS
                )
                weight_pairs.index(1 - HALF).store(following)
                fence_async_shared()
                _barrier()
                phase = gl.where(stage == STAGES - 1, phase ^ 1, phase)
                stage = gl.where(stage == STAGES - 1, 0, stage + 1)
            words = ahead
        # The next piece's weights are under way while this one is stored.
        next_work = gl.minimum(work + gl.num_programs(0), works - 1)
        tile_ptr, words, top, bottom = _load_weights(
            next_work, tiles_ptr, lut_ptr, lane, warp, M, N, blocks, share, BITS, TOKENS, WARPS, CONVERT
        )
        total = warpgroup_mma_wait(0, [sums])
        if HAS_BIAS:
            place = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SUMS))
            row = first_row + place // 8 * 8 + place % 4 * 2 + place % 8 // 4
            total += gl.expand_dims(gl.load(bias_ptr + row, row < N, 0).to(dtype).to(gl.float32), 1)
        _store(total, out, y_ptr, first_row, first_token, split * M, M, N, WARPS)
