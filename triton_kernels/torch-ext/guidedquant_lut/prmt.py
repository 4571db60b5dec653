"""Decoding by byte permutes: the inline PTX of the tensor-core kernels, and the same arithmetic in plain Triton.

``prmt.b32 d, a, b, s`` picks four of the eight bytes of (a, b) by the four low nibbles of s, so it is a look-up in a
table of eight bytes that lives in two registers. Every function works on int32 tensors of one element per thread.
Registers of 16-bit weights hold two neighbours: the even input in the low half.

With ``ASM`` false everything is plain Triton, which the interpreter runs too: so indices and masks are tested without a
GPU.
"""
# mypy: ignore-errors
# (Triton's compiler, not Python, runs most of this file.)

import triton
import triton.language as tl

_constexpr = tl.constexpr


def _lookup_2bit() -> str:
    """$0-$7: the 16 weights of word $8; $9, $10: the four entries, two a register.

    The nibble pair (2 c, 2 c + 1) selects both bytes of entry c. Codes stand in bytes, so that one multiplication turns
    four of them into four such pairs.
    """
    lines = ["{ .reg .b32 t, s;"]
    for field in range(4):
        if field:
            lines.append(f"shr.u32 t, $8, {2 * field}; and.b32 t, t, 0x03030303;")
        else:
            lines.append("and.b32 t, $8, 0x03030303;")
        lines.append("mad.lo.u32 s, t, 0x22, 0x10101010;")
        lines.append(f"prmt.b32 ${2 * field}, $9, $10, s; shr.u32 s, s, 16; prmt.b32 ${2 * field + 1}, $9, $10, s;")
    return "\n".join([*lines, "}"])


def _lookup_3bit(half: int) -> str:
    """$0-$7: 16 weights of word $8 (their low bits) and half of word $9 (third bits); $10-$13: byte tables."""
    lines = ["{ .reg .b32 y, t, l, h;"]
    for group in range(2):
        shift = {0: "shl.b32 y, $9, 2;", 1: "shl.b32 y, $9, 1;", 2: "", 3: "shr.u32 y, $9, 1;"}[2 * half + group]
        lines.append(f"{shift} and.b32 y, {'y' if shift else '$9'}, 0x44444444;")
        low = "$8"
        if group:
            lines.append("shr.u32 t, $8, 2;")
            low = "t"
        lines.append(f"lop3.b32 t, {low}, 0x33333333, y, 0xEA;")
        for part in range(2):
            if part:
                lines.append("shr.u32 t, t, 16;")
            out = 4 * group + 2 * part
            lines.append("prmt.b32 l, $10, $11, t; prmt.b32 h, $12, $13, t;")
            lines.append(f"prmt.b32 ${out}, l, h, 0x5140; prmt.b32 ${out + 1}, l, h, 0x7362;")
    return "\n".join([*lines, "}"])


def _lookup_4bit() -> str:
    """$0-$3: the 8 weights of word $4; $5-$12: byte tables. Entries 0-7 and 8-15 are looked up, then one is chosen."""
    lines = ["{ .reg .b32 s, m, l, h, p, q; and.b32 s, $4, 0x77777777; shr.u32 m, $4, 1;"]
    lines.append("lop3.b32 m, m, 0x44444444, 0x32103210, 0xEA;")
    for half in range(2):
        if half:
            lines.append("shr.u32 s, s, 16; shr.u32 m, m, 16;")
        lines.append("prmt.b32 p, $5, $6, s; prmt.b32 q, $7, $8, s; prmt.b32 l, p, q, m;")
        lines.append("prmt.b32 p, $9, $10, s; prmt.b32 q, $11, $12, s; prmt.b32 h, p, q, m;")
        lines.append(f"prmt.b32 ${2 * half}, l, h, 0x5140; prmt.b32 ${2 * half + 1}, l, h, 0x7362;")
    return "\n".join([*lines, "}"])


def _constraints(outputs: int, inputs: int, kind: str = "=&r") -> str:
    return ",".join([kind] * outputs + ["r"] * inputs)


_ASM2, _C2 = _constexpr(_lookup_2bit()), _constexpr(_constraints(8, 3))
_ASM3_FIRST, _ASM3_SECOND = _constexpr(_lookup_3bit(0)), _constexpr(_lookup_3bit(1))
_C3 = _constexpr(_constraints(8, 6))
_ASM4, _C4 = _constexpr(_lookup_4bit()), _constexpr(_constraints(4, 9))
_INT4, _INT8 = (_constexpr((tl.int32,) * n) for n in (4, 8))
_FLOAT4 = _constexpr((tl.float32,) * 4)
_MMA = {
    kind: f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    for kind in ("f16", "bf16")
}
_MMA_F16, _MMA_BF16 = _constexpr(_MMA["f16"]), _constexpr(_MMA["bf16"])
_C_MMA = _constexpr("=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f")
# Two fp16 in a register -> two bf16.
_TO_BF16 = _constexpr(
    "{ .reg .b16 a, b; .reg .f32 x, y; mov.b32 {a, b}, $1; cvt.f32.f16 x, a; cvt.f32.f16 y, b; "
    "cvt.rn.bf16x2.f32 $0, y, x; }"
)


@triton.jit
def split4(vectors):
    """``[T, 4]`` -> its four columns, ``[T]`` each."""
    pairs = tl.reshape(vectors, [vectors.shape[0], 2, 2])
    even, odd = tl.split(pairs)
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def join4(a, b, c, d):
    """Inverse of :func:`split4`."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [a.shape[0], 4])


# One register of two weights -> both.
_HALVES = _constexpr("mov.b32 {$0, $1}, $2;")


@triton.jit
def half_block_matrix(top, bottom, WARPS: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr):
    """Half of the decoded tiles of all warps, 8 registers a row and lane, as the matrix ``[16 * WARPS, 64]``.

    Register 4 p + j of lane 4 g + t holds the inputs 32 p + 8 t + 2 j and the next; a join adds the fastest dimension.
    """
    rows = ()
    for i in tl.static_range(8):
        rows = rows + (tl.join(top[i], bottom[i]),)
    parts = ()
    for i in tl.static_range(4):
        parts = parts + (tl.join(rows[i], rows[i + 4]),)
    pairs = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))
    pairs = tl.permute(tl.reshape(pairs, [WARPS, 8, 4, 2, 2, 4]), (0, 3, 1, 4, 2, 5))  # warp, half, g, p, t, j
    pairs = tl.reshape(pairs, [16 * WARPS, 32])
    if not ASM:
        dtype: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
        even = (pairs & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
        odd = ((pairs >> 16) & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    elif BF16:
        even, odd = tl.inline_asm_elementwise(
            _HALVES, "=h,=h,r", [pairs], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=1
        )
    else:
        even, odd = tl.inline_asm_elementwise(
            _HALVES, "=h,=h,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=1
        )
    return tl.reshape(tl.join(even, odd), [16 * WARPS, 64])


@triton.jit
def finished(sums):
    """The sums, once all products that add to them are done.

    Tensor cores read decoded weights out of registers while the warps go on. Left to itself, Triton (3.6, 3.7) lets the
    product of one round of a loop run into the next, whose weights overwrite those registers.
    """
    return tl.inline_asm_elementwise("mov.f32 $0, $1;", "=f,f", [sums], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def to_bf16(pair, ASM: tl.constexpr):
    """Two fp16 in an int32 -> the two bf16 next to them."""
    if ASM:
        return tl.inline_asm_elementwise(_TO_BF16, "=r,r", [pair], dtype=tl.int32, is_pure=True, pack=1)
    else:
        low, high = _halves(pair, False)
        low = low.to(tl.bfloat16).to(tl.int16, bitcast=True)
        high = high.to(tl.bfloat16).to(tl.int16, bitcast=True)
        return (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)


@triton.jit
def byte_permute(a, b, SELECTOR: tl.constexpr):
    """``prmt.b32`` with a constant selector."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, " + SELECTOR + ";", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def tables(entries, BITS: tl.constexpr, ASM: tl.constexpr):
    """A codebook's registers (two entries each) as the decoder wants them.

    3 and 4 bits: the low bytes of all entries, four a register, then the high bytes. 2 bits, or without ``ASM``: as
    they are.
    """
    if not ASM or BITS == 2:
        return entries
    else:
        low = ()
        high = ()
        for i in tl.static_range(2 ** (BITS - 2)):
            low = low + (byte_permute(entries[2 * i], entries[2 * i + 1], "0x6420"),)
            high = high + (byte_permute(entries[2 * i], entries[2 * i + 1], "0x7531"),)
        return low + high


@triton.jit
def decode_row(words, table, BITS: tl.constexpr, ASM: tl.constexpr):
    """The 32 weights that a lane holds of one row: 16 registers, in order of the inputs."""
    return decode_half(words, table, 0, BITS, ASM) + decode_half(words, table, 1, BITS, ASM)


@triton.jit
def decode_half(words, table, HALF: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """The first or the second 16 of them, in 8 registers."""
    weights = ()
    if not ASM:
        for pair in tl.static_range(8):
            low = _entry(_code(words, 16 * HALF + 2 * pair, BITS), table, BITS)
            high = _entry(_code(words, 16 * HALF + 2 * pair + 1, BITS), table, BITS)
            weights = weights + (low | (high << 16),)
    elif BITS == 2:
        arguments = [words[HALF], table[0], table[1]]
        weights = tl.inline_asm_elementwise(_ASM2, _C2, arguments, dtype=_INT8, is_pure=True, pack=1)
    elif BITS == 3:
        asm: tl.constexpr = _ASM3_FIRST if HALF == 0 else _ASM3_SECOND
        arguments = [words[HALF], words[2], table[0], table[1], table[2], table[3]]
        weights = tl.inline_asm_elementwise(asm, _C3, arguments, dtype=_INT8, is_pure=True, pack=1)
    else:
        for i in tl.static_range(2):
            word = words[2 * HALF + i]
            arguments = [word, table[0], table[1], table[2], table[3], table[4], table[5], table[6], table[7]]
            weights = weights + tl.inline_asm_elementwise(_ASM4, _C4, arguments, dtype=_INT4, is_pure=True, pack=1)
    return weights


@triton.jit
def _code(words, I: tl.constexpr, BITS: tl.constexpr):
    """Code I of 32; the places are those of tiles.py."""
    if BITS == 2:
        return (words[I // 16] >> (16 * (I % 16 // 2 % 2) + 8 * (I % 2) + 2 * (I % 16 // 4))) & 3
    elif BITS == 3:
        low = (words[I // 16] >> (4 * (I % 8) + 2 * (I // 8 % 2))) & 3
        return low | (((words[2] >> (4 * (I % 8) + I // 8)) & 1) << 2)
    else:
        return (words[I // 8] >> (4 * (I % 8))) & 15


@triton.jit
def _entry(code, table, BITS: tl.constexpr):
    """The 16 bits of entry ``code``, by a chain of selections."""
    value = table[0] & 0xFFFF
    for i in tl.static_range(1, 2**BITS):
        value = tl.where(code == i, (table[i // 2] >> (16 * (i % 2))) & 0xFFFF, value)
    return value


@triton.jit
def mma(a0, a1, a2, a3, b0, b1, c, BF16: tl.constexpr, ASM: tl.constexpr):
    """``mma.m16n8k16``: c[16, 8] += a[16, 16] b[16, 8] with every lane's fragments, fp32 sums. Whole warps only."""
    if ASM:
        return tl.inline_asm_elementwise(
            _MMA_BF16 if BF16 else _MMA_F16,
            _C_MMA,
            [a0, a1, a2, a3, b0, b1, c[0], c[1], c[2], c[3]],
            dtype=_FLOAT4,
            is_pure=True,
            pack=1,
        )
    else:
        c0, c1 = _outer(a0, a2, b0, b1, BF16)
        c2, c3 = _outer(a1, a3, b0, b1, BF16)
        return (c[0] + c0, c[1] + c1, c[2] + c2, c[3] + c3)


@triton.jit
def _outer(a0, a2, b0, b1, BF16: tl.constexpr):
    """Eight rows of the product in plain Triton: lane 4 g + t gets row g, columns 2 t and 2 t + 1."""
    warps: tl.constexpr = a0.shape[0] // 32
    total = tl.zeros([warps, 8, 8], tl.float32)
    for half in tl.static_range(2):
        a_low, a_high = _halves(a0 if half == 0 else a2, BF16)
        b_low, b_high = _halves(b0 if half == 0 else b1, BF16)
        rows_low, rows_high = tl.reshape(a_low, [warps, 8, 1, 4]), tl.reshape(a_high, [warps, 8, 1, 4])
        columns_low, columns_high = tl.reshape(b_low, [warps, 1, 8, 4]), tl.reshape(b_high, [warps, 1, 8, 4])
        total += tl.sum(rows_low * columns_low + rows_high * columns_high, axis=3)
    even, odd = tl.split(tl.reshape(total, [warps, 8, 4, 2]))
    return tl.reshape(even, [32 * warps]), tl.reshape(odd, [32 * warps])


@triton.jit
def _halves(register, BF16: tl.constexpr):
    low, high = (register & 0xFFFF).to(tl.int16), ((register >> 16) & 0xFFFF).to(tl.int16)
    if BF16:
        return low.to(tl.bfloat16, bitcast=True).to(tl.float32), high.to(tl.bfloat16, bitcast=True).to(tl.float32)
    else:
        return low.to(tl.float16, bitcast=True).to(tl.float32), high.to(tl.float16, bitcast=True).to(tl.float32)


def _sum_warps_asm(warps: int) -> str:
    """Every warp leaves its 128 partial sums in shared memory; every thread adds up its share of them, in order."""
    outputs = max(1, 4 // warps)
    inputs = [f"${outputs + i}" for i in range(4)]
    lines = [
        f"{{ .shared .align 16 .b8 sums[{512 * warps}]; .reg .b32 base, at, tid; .reg .f32 v;",
        "mov.u32 tid, %tid.x; mov.u32 base, sums; shl.b32 at, tid, 4; add.u32 at, at, base;",
        f"st.shared.v4.f32 [at], {{{', '.join(inputs)}}}; bar.sync 0;",
        "shl.b32 at, tid, 2; and.b32 at, at, 511; add.u32 at, at, base;",
    ]
    for out in range(outputs):
        lines.append(f"ld.shared.f32 ${out}, [at+{128 * warps * out}];")
        for warp in range(1, warps):
            lines.append(f"ld.shared.f32 v, [at+{512 * warp + 128 * warps * out}]; add.f32 ${out}, ${out}, v;")
    return "\n".join([*lines, "}"])


_SUM = {warps: _sum_warps_asm(warps) for warps in (2, 4, 8, 16)}
_SUM2, _SUM4, _SUM8, _SUM16 = (_constexpr(_SUM[warps]) for warps in (2, 4, 8, 16))
_FLOAT2 = _constexpr((tl.float32,) * 2)


@triton.jit
def sum_warps(c, WARPS: tl.constexpr, ASM: tl.constexpr):
    """Sums of the warps' accumulators.

    Of the 128 sums, sum 4 l + i is that of ``c[i]`` in lane l. Thread j gets sum j + n * threads, modulo 128, as its
    result n.
    """
    if WARPS == 1:
        total = c
    elif not ASM:
        total = _sum_warps_plain(c, WARPS)
    elif WARPS == 2:
        total = tl.inline_asm_elementwise(
            _SUM2, "=&f,=&f,f,f,f,f", [c[0], c[1], c[2], c[3]], dtype=_FLOAT2, is_pure=False, pack=1
        )
    else:
        asm: tl.constexpr = _SUM4 if WARPS == 4 else (_SUM8 if WARPS == 8 else _SUM16)
        total = (
            tl.inline_asm_elementwise(
                asm, "=&f,f,f,f,f", [c[0], c[1], c[2], c[3]], dtype=tl.float32, is_pure=False, pack=1
            ),
        )
    return total


@triton.jit
def _sum_warps_plain(c, WARPS: tl.constexpr):
    total = tl.sum(tl.reshape(join4(c[0], c[1], c[2], c[3]), [WARPS, 128]), axis=0)
    if WARPS == 2:
        return tl.split(tl.permute(tl.reshape(total, [2, 64]), (1, 0)))
    else:
        return (tl.reshape(tl.broadcast_to(tl.reshape(total, [1, 128]), [WARPS // 4, 128]), [32 * WARPS]),)
