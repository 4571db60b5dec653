"""Kernels on tiles (see tiles.py): products on tensor cores, the weights decoded in registers, and the dense matrix.

Tensors of ``32 * WARPS`` elements have one element per thread, in order; ``[threads, 4]`` tensors have a vector per
thread. Triton lays them out so, but does not promise it: tensor_core.py tries before it relies on it.
"""
# mypy: ignore-errors
# (Triton's compiler, not Python, runs this file.)

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .prmt import decode_half, decode_row, finished, half_block_matrix, join4, mma, split4, sum_warps, tables, to_bf16


@triton.jit
def _load_vector(pointers, columns: tl.constexpr, valid, EVEN: tl.constexpr):
    """Words that are read once. Invalid lanes read nothing and hold anything."""
    vectors = pointers[:, None] + tl.arange(0, columns)[None, :]
    if EVEN:
        return tl.load(vectors, eviction_policy="evict_first")
    return tl.load(vectors, valid[:, None], eviction_policy="evict_first")


@triton.jit
def _load_tile(tile_ptr, lane, valid, BITS: tl.constexpr, EVEN: tl.constexpr):
    """A lane's words of one tile: those of row g, and those of row g + 8."""
    first = split4(_load_vector(tile_ptr + lane * 4, 4, valid, EVEN))
    if BITS == 2:
        return (first[0], first[1]), (first[2], first[3])
    elif BITS == 3:
        third = tl.split(_load_vector(tile_ptr + 128 + lane * 2, 2, valid, EVEN))
        return (first[0], first[1], third[0]), (first[2], first[3], third[1])
    else:
        return first, split4(_load_vector(tile_ptr + 128 + lane * 4, 4, valid, EVEN))


@triton.jit
def _load_tiles(
    tiles, lane, warp, blocks, step,
    BITS: tl.constexpr, ROW_TILES: tl.constexpr, UNROLL: tl.constexpr, WARPS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The words of a step: UNROLL blocks of 128 inputs for every warp, ROW_TILES tiles each."""
    words = ()
    for u in tl.static_range(UNROLL):
        valid = step + u * WARPS + warp < blocks
        for r in tl.static_range(ROW_TILES):
            words = words + (_load_tile(tiles[r] + (step + u * WARPS) * (64 * BITS), lane, valid, BITS, EVEN),)
    return words


@triton.jit
def load_codebook(lut_ptr, row, BITS: tl.constexpr, TO_BF16: tl.constexpr, ASM: tl.constexpr):
    """A row's codebook in registers, as the decoder wants it."""
    pointer = lut_ptr.to(tl.pointer_type(tl.int32)) + row * 2 ** (BITS - 1)
    entries = ()
    for i in tl.static_range(2 ** (BITS - 1)):
        pair = tl.load(pointer + i)
        if TO_BF16:
            pair = to_bf16(pair, ASM)
        entries = entries + (pair,)
    return tables(entries, BITS, ASM)


@triton.jit
def _load_inputs(token_ptr, live, block, p: tl.constexpr, warp, quad, K, EVEN: tl.constexpr):
    """Eight neighbouring activations of a lane's token, in four registers. Past K they are 0."""
    pointers = (token_ptr + (block * 64 + 16 * p))[:, None] + tl.arange(0, 4)[None, :]
    if EVEN:
        return split4(tl.load(pointers))
    k = (block + warp) * 128 + 32 * p + quad * 8
    return split4(tl.load(pointers, (live & (k < K))[:, None], 0))


@triton.jit
def _load_block(tokens, live, block, warp, quad, K, TOKEN_TILES: tl.constexpr, EVEN: tl.constexpr):
    """The activations of 128 inputs: those of part p of token tile m are item p * TOKEN_TILES + m."""
    inputs = ()
    for p in tl.static_range(4):
        for m in tl.static_range(TOKEN_TILES):
            inputs = inputs + (_load_inputs(tokens[m], live[m], block, p, warp, quad, K, EVEN),)
    return inputs


@triton.jit
def _multiply(
    sums, words, inputs, top, bottom, tokens, live, step, warp, quad, K,
    BITS: tl.constexpr, ROW_TILES: tl.constexpr, TOKEN_TILES: tl.constexpr, UNROLL: tl.constexpr, WARPS: tl.constexpr,
    BF16: tl.constexpr, EVEN: tl.constexpr, AHEAD: tl.constexpr, LAST: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Decode the words of a step and add their products with the activations to the sums.

    AHEAD: ``inputs`` are the activations of the step's first block; returned are those of the next step's.
    """
    for u in tl.static_range(UNROLL):
        following = inputs
        if AHEAD and not (LAST and u == UNROLL - 1):
            following = _load_block(tokens, live, step + (u + 1) * WARPS, warp, quad, K, TOKEN_TILES, EVEN)
        weights = ()
        for r in tl.static_range(ROW_TILES):
            upper, lower = words[u * ROW_TILES + r]
            weights = weights + ((decode_row(upper, top[r], BITS, ASM), decode_row(lower, bottom[r], BITS, ASM)),)
        for p in tl.static_range(4):
            part = ()
            for m in tl.static_range(TOKEN_TILES):
                if AHEAD:
                    part = part + (inputs[p * TOKEN_TILES + m],)
                else:
                    part = part + (_load_inputs(tokens[m], live[m], step + u * WARPS, p, warp, quad, K, EVEN),)
            new = ()
            for r in tl.static_range(ROW_TILES):
                a, b = weights[r]
                for m in tl.static_range(TOKEN_TILES):
                    c = sums[r * TOKEN_TILES + m]
                    x = part[m]
                    c = mma(a[4 * p], b[4 * p], a[4 * p + 1], b[4 * p + 1], x[0], x[1], c, BF16, ASM)
                    c = mma(a[4 * p + 2], b[4 * p + 2], a[4 * p + 3], b[4 * p + 3], x[2], x[3], c, BF16, ASM)
                    new = new + (c,)
            sums = new
        inputs = following
    return sums, inputs


@triton.jit
def _store_sums(
    sums, first_row, first_token, bias_ptr, y_ptr, M, N, WARPS: tl.constexpr, HAS_BIAS: tl.constexpr, ASM: tl.constexpr
):
    """Add up what the warps have of 16 rows and 8 tokens, add the bias, and store."""
    totals = sum_warps(sums, WARPS, ASM)
    thread = tl.arange(0, 32 * WARPS)
    for i in tl.static_range(len(totals)):
        if WARPS == 1:
            element = thread * 4 + i
        else:
            element = thread + i * (32 * WARPS)
        # Sum 4 l + i is row l / 4 (+ 8 for i of 2 and 3) and token 2 (l % 4) (+ 1 for odd i).
        row = first_row + element // 16 + 8 * (element // 2 % 2)
        token = first_token + 2 * (element // 4 % 4) + element % 2
        keep = (element < 128) & (row < N) & (token < M)
        total = totals[i]
        if HAS_BIAS:
            total += tl.load(bias_ptr + row, keep, 0).to(y_ptr.dtype.element_ty).to(tl.float32)
        tl.store(y_ptr + token.to(tl.int64) * N + row, total.to(y_ptr.dtype.element_ty), keep)


@triton.jit(do_not_specialize=["M", "N", "K", "stride_x8"])
def vector_kernel(
    x_ptr, tiles_ptr, lut_ptr, bias_ptr, y_ptr, M, N, K, stride_x8,
    BITS: tl.constexpr, ROW_TILES: tl.constexpr, TOKEN_TILES: tl.constexpr, UNROLL: tl.constexpr, WARPS: tl.constexpr,
    BF16: tl.constexpr, CONVERT: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
    AHEAD: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """``y[M, N] = x[M, K] @ W.T + bias``.

    A program takes 16 ROW_TILES rows and 8 TOKEN_TILES tokens; its warps share out the blocks of 128 inputs and add up
    in order at the end. The words of a step are on their way while the step before is multiplied.

    Args:
        x_ptr, y_ptr: fp16 or (BF16) bf16. Rows of x begin at multiples of 16 bytes, ``8 * stride_x8`` elements apart;
            those of y N elements apart.
        lut_ptr: ``[N, 2**BITS]`` in the dtype of x, or (CONVERT) fp16 beside bf16 activations.
        EVEN: K is a multiple of ``128 * WARPS * UNROLL``: nothing needs a mask.
        PDL: The weights are fetched while the kernel before still runs, and the kernel after may begin to do so when
            this one begins (1) or ends its loop (2). 0: never.
        AHEAD: Activations are fetched a block of inputs ahead, in more registers.
        ASM: See prmt.py.
    """
    thread = tl.arange(0, 32 * WARPS)
    lane, warp = thread % 32, thread // 32
    group, quad = lane // 4, lane % 4
    blocks = tl.cdiv(K, 128)
    row_tiles = tl.cdiv(N, 16)
    first_tile = tl.program_id(0) * ROW_TILES
    first_token = tl.program_id(1) * (8 * TOKEN_TILES)
    if PDL == 1:
        gdc_launch_dependents()

    tiles = ()
    for r in tl.static_range(ROW_TILES):
        # A tile past the last one repeats it; its rows are never stored.
        tile = tl.minimum(first_tile + r, row_tiles - 1).to(tl.int64) * blocks
        tiles = tiles + (tiles_ptr + (tile + warp) * (64 * BITS),)
    words = _load_tiles(tiles, lane, warp, blocks, 0, BITS, ROW_TILES, UNROLL, WARPS, EVEN)
    top = ()
    bottom = ()
    for r in tl.static_range(ROW_TILES):
        row = (first_tile + r) * 16 + group
        top = top + (load_codebook(lut_ptr, tl.minimum(row, N - 1), BITS, CONVERT, ASM),)
        bottom = bottom + (load_codebook(lut_ptr, tl.minimum(row + 8, N - 1), BITS, CONVERT, ASM),)
    tokens = ()
    live = ()
    for m in tl.static_range(TOKEN_TILES):
        token = first_token + 8 * m + group
        live = live + (token < M,)
        # Likewise for the last token: reading it again costs less than a mask.
        offset = tl.minimum(token, M - 1).to(tl.int64) * (stride_x8 * 4)
        tokens = tokens + (x_ptr.to(tl.pointer_type(tl.int32)) + (offset + warp * 64 + quad * 4),)
    zero = tl.zeros([32 * WARPS], tl.float32)
    sums = ()
    for i in tl.static_range(ROW_TILES * TOKEN_TILES):
        sums = sums + ((zero, zero, zero, zero),)
    if PDL > 0:
        # The activations, unlike the weights, may come from the kernel before.
        gdc_wait()
    inputs = ()
    if AHEAD:
        inputs = _load_block(tokens, live, 0, warp, quad, K, TOKEN_TILES, EVEN)

    last = (tl.cdiv(blocks, WARPS * UNROLL) - 1) * (WARPS * UNROLL)
    for step in range(0, last, WARPS * UNROLL):
        ahead = _load_tiles(tiles, lane, warp, blocks, step + WARPS * UNROLL, BITS, ROW_TILES, UNROLL, WARPS, EVEN)
        sums, inputs = _multiply(
            sums, words, inputs, top, bottom, tokens, live, step, warp, quad, K,
            BITS, ROW_TILES, TOKEN_TILES, UNROLL, WARPS, BF16, EVEN, AHEAD, False, ASM,
        )  # fmt: skip
        words = ahead
    if PDL == 2:
        gdc_launch_dependents()
    sums, inputs = _multiply(
        sums, words, inputs, top, bottom, tokens, live, last, warp, quad, K,
        BITS, ROW_TILES, TOKEN_TILES, UNROLL, WARPS, BF16, EVEN, AHEAD, True, ASM,
    )  # fmt: skip

    for r in tl.static_range(ROW_TILES):
        for m in tl.static_range(TOKEN_TILES):
            _store_sums(
                sums[r * TOKEN_TILES + m], (first_tile + r) * 16, first_token + 8 * m, bias_ptr, y_ptr, M, N,
                WARPS, HAS_BIAS, ASM,
            )  # fmt: skip


@triton.jit(do_not_specialize=["M", "N", "K", "stride_x8"])
def matrix_kernel(
    x_ptr, tiles_ptr, lut_ptr, bias_ptr, y_ptr, M, N, K, stride_x8,
    BITS: tl.constexpr, TOKENS: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr, BF16: tl.constexpr,
    CONVERT: tl.constexpr, HAS_BIAS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """``y[splits, M, N]``, which add up to ``x[M, K] @ W.T + bias``, for many tokens.

    A program takes 16 WARPS rows, TOKENS tokens and its split of the blocks of 128 inputs. Every warp decodes one tile
    of a block; decoded, half of the tiles at a time is the first operand of a dot whose second are activations, fetched
    STAGES blocks ahead. Arguments as those of :func:`vector_kernel`; for several splits y is fp32.
    """
    thread = tl.arange(0, 32 * WARPS)
    lane, warp = thread % 32, thread // 32
    group = lane // 4
    blocks = tl.cdiv(K, 128)
    share = tl.cdiv(blocks, tl.num_programs(2))
    begin = tl.program_id(2) * share
    end = tl.minimum(begin + share, blocks)
    first_row = tl.program_id(0) * (16 * WARPS)
    # A tile past the last one repeats it; its rows are never stored.
    tile = tl.minimum(tl.program_id(0) * WARPS + warp, tl.cdiv(N, 16) - 1)
    row = tile * 16 + group
    top = load_codebook(lut_ptr, tl.minimum(row, N - 1), BITS, CONVERT, ASM)
    bottom = load_codebook(lut_ptr, tl.minimum(row + 8, N - 1), BITS, CONVERT, ASM)
    # A split without blocks has a tile to read nevertheless.
    tile_ptr = tiles_ptr + (tile.to(tl.int64) * blocks + tl.minimum(begin, blocks - 1)) * (64 * BITS)
    words = _load_tile(tile_ptr, lane, lane >= 0, BITS, True)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    k = tl.arange(0, 64)
    x_ptrs = x_ptr + (tl.minimum(token, M - 1).to(tl.int64) * (stride_x8 * 8))[None, :] + k[:, None]
    sums = tl.zeros([16 * WARPS, TOKENS], tl.float32)
    for block in tl.range(begin, end, num_stages=STAGES):
        # The last block is fetched again instead of one past the end.
        tile_ptr += tl.where(block + 1 < end, 64 * BITS, 0)
        ahead = _load_tile(tile_ptr, lane, lane >= 0, BITS, True)
        for half in tl.static_range(2):
            upper = decode_half(words[0], top, half, BITS, ASM)
            lower = decode_half(words[1], bottom, half, BITS, ASM)
            weights = half_block_matrix(upper, lower, WARPS, BF16, ASM)
            # K is a multiple of 8: the compiler must see that, to fetch 16 bytes at a time.
            live = block * 16 + half * 8 + k // 8 < K // 8
            x = tl.load(x_ptrs + (block * 128 + half * 64), live[:, None], 0)
            if ASM:
                sums = tl.dot(weights, x, sums)
            else:
                # The interpreter's dot is wrong for bf16.
                sums += tl.dot(weights.to(tl.float32), x.to(tl.float32), input_precision="ieee")
        if ASM:
            sums = finished(sums)
        words = ahead
    rows = first_row + tl.arange(0, 16 * WARPS)
    keep = (token < M)[None, :] & (rows < N)[:, None]
    if HAS_BIAS:
        sums += tl.load(bias_ptr + rows, rows < N, 0).to(y_ptr.dtype.element_ty).to(tl.float32)[:, None]
    target = y_ptr + (tl.program_id(2) * M + token).to(tl.int64)[None, :] * N + rows[:, None]
    tl.store(target, sums.to(y_ptr.dtype.element_ty), keep)


@triton.jit(do_not_specialize=["SIZE", "N", "SPLITS"])
def add_splits_kernel(parts_ptr, bias_ptr, y_ptr, SIZE, N, SPLITS, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """``y[SIZE] = parts[SPLITS, SIZE].sum(0) + bias``, in order; SIZE is M N."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = element < SIZE
    total = tl.zeros([BLOCK], tl.float32)
    part = parts_ptr + element
    for _ in range(SPLITS):
        total += tl.load(part, keep, 0)
        part += SIZE
    if HAS_BIAS:
        total += tl.load(bias_ptr + element % N, keep, 0).to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + element, total.to(y_ptr.dtype.element_ty), keep)


@triton.jit(do_not_specialize=["N", "K", "stride_8"])
def dequantize_kernel(
    tiles_ptr, lut_ptr, dense_ptr, N, K, stride_8,
    BITS: tl.constexpr, WARPS: tl.constexpr, CONVERT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """``dense[N, K]`` in the dtype of the codebook, or (CONVERT) in bf16 from fp16. A warp takes one tile.

    Rows of ``dense_ptr`` (int32: two weights) are ``8 * stride_8`` weights apart, and K is a multiple of 8.
    """
    thread = tl.arange(0, 32 * WARPS)
    lane, warp = thread % 32, thread // 32
    group, quad = lane // 4, lane % 4
    blocks = tl.cdiv(K, 128)
    block = tl.program_id(1) * WARPS + warp
    tile_ptr = tiles_ptr + (tl.program_id(0).to(tl.int64) * blocks + block) * (64 * BITS)
    words = _load_tile(tile_ptr, lane, block < blocks, BITS, False)
    for half in tl.static_range(2):
        row = tl.program_id(0) * 16 + group + 8 * half
        codebook = load_codebook(lut_ptr, tl.minimum(row, N - 1), BITS, CONVERT, ASM)
        weights = decode_row(words[half], codebook, BITS, ASM)
        for p in tl.static_range(4):
            k = block * 128 + 32 * p + quad * 8
            vector = join4(weights[4 * p], weights[4 * p + 1], weights[4 * p + 2], weights[4 * p + 3])
            target = dense_ptr + (row.to(tl.int64) * (stride_8 * 4) + k // 2)
            keep = (row < N) & (k < K)
            tl.store(target[:, None] + tl.arange(0, 4)[None, :], vector, keep[:, None])
