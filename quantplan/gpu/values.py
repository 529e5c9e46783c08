"""What codes and scales are worth, inside Triton kernels: packed codes of 2 to 8 bits to float32, step by step of a scheme.

A weight is `step * (level(code) - zero point)`. Codes lie as `numerics.pack_bits` writes them, a row in whole 32-bit words. A
level is the code itself, a small float or an entry of a table; a step is a float, a power of two (e8m0) or an e4m3 float.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def float_of(code, BITS: tl.constexpr, MANTISSA: tl.constexpr, UNIT: tl.constexpr):
    """The value of a small float, float32: its exponent and mantissa moved into those of a float32, and `UNIT`, 2 to the
    difference of the biases. Denormals come out right, as multiplication keeps them. There is no NaN and no infinity in codes."""
    magnitude = (code & ((1 << (BITS - 1)) - 1)) << (23 - MANTISSA)
    sign = (code >> (BITS - 1)) << 31
    return (magnitude | sign).to(tl.float32, bitcast=True) * UNIT


@triton.jit
def power_of(byte):
    """`2 ** (byte - 127)`, float32, of e8m0 bytes below 255."""
    return tl.where(byte == 0, 0x400000, byte << 23).to(tl.float32, bitcast=True)


@triton.jit
def step_at(scale, index, mask, SCALE: tl.constexpr):
    """Scales read as float32: `SCALE` is how they are stored, `float`, `e8m0` or `e4m3`."""
    stored = tl.load(scale + index, mask=mask, other=0)
    if SCALE == "e8m0":
        return power_of(stored.to(tl.int32))
    elif SCALE == "e4m3":
        return float_of(stored.to(tl.int32), 8, 3, 2.0**120)
    else:
        return stored.to(tl.float32)


@triton.jit
def level_of(code, zero, table, BITS: tl.constexpr, MANTISSA: tl.constexpr, UNIT: tl.constexpr, LEVELS: tl.constexpr):
    """Levels of codes, less the zero point (of integers alone), float32."""
    if LEVELS == "float":
        return float_of(code, BITS, MANTISSA, UNIT)
    elif LEVELS == "table":
        return tl.load(table + code)
    else:
        # an integer below 2^23 in the mantissa of 2^23: converting takes a quarter of the GPU's rate, this all of it
        return (code | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + zero)


@triton.jit
def weights(
    words,
    scale,
    zeros,
    table,
    n,
    k0,
    rows,
    columns,
    pitch,
    across,
    tall,
    wide,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    MANTISSA: tl.constexpr,
    UNIT: tl.constexpr,
    SCALE: tl.constexpr,
    ZEROS: tl.constexpr,
    WHOLE: tl.constexpr,
    BY_WORD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of the weight, float32 `[BLOCK_N, BLOCK_K]`: rows `n`, columns from `k0`, a multiple of `BLOCK_K`.

    `pitch`: words a row; `across`: scales a row; `tall` rows and `wide` columns share one. `WHOLE`: a row has one scale, which is
    left out here. `BY_WORD`: codes do not cross words, and a word's codes share their scale. `ZEROS`: zero points are stored;
    else the middle of the grid is zero. Outside the matrix weights are finite.
    """
    MIDDLE: tl.constexpr = 1 << (BITS - 1)
    MASK: tl.constexpr = (1 << BITS) - 1
    row = n.to(tl.int64)[:, None] * pitch
    down = (n // tall)[:, None] * across
    inside = (n < rows)[:, None]
    if BY_WORD:
        PER: tl.constexpr = 32 // BITS
        COUNT: tl.constexpr = BLOCK_K // PER
        w = k0 // PER + tl.arange(0, COUNT)[None, :]
        mask = inside & (w < pitch)
        word = tl.load(words + row + w, mask=mask, other=0)
        shift = (tl.arange(0, PER) * BITS)[None, None, :]
        code = (word[:, :, None] >> shift) & MASK
        if WHOLE:
            index, valid = down, inside
        else:
            index, valid = down + (w * PER) // wide, mask & (w * PER < columns)
        if ZEROS:
            zero = tl.load(zeros + index, mask=valid, other=0).to(tl.float32)[:, :, None]
        else:
            zero = MIDDLE
        value = level_of(code, zero, table, BITS, MANTISSA, UNIT, LEVELS)
        if not WHOLE:
            value = value * step_at(scale, index, valid, SCALE)[:, :, None]
        return tl.reshape(value, (BLOCK_N, BLOCK_K))
    else:
        k = k0 + tl.arange(0, BLOCK_K)[None, :]
        mask = inside & (k < columns)
        bit = k * BITS
        offset = bit % 32
        at = words + row + bit // 32
        low = tl.load(at, mask=mask, other=0).to(tl.uint32, bitcast=True) >> offset
        high = tl.load(at + 1, mask=mask & (offset + BITS > 32), other=0).to(tl.uint32, bitcast=True)
        code = (low | ((high << (31 - offset)) << 1)).to(tl.int32, bitcast=True) & MASK
        if WHOLE:
            index, valid = down, inside
        else:
            index, valid = down + k // wide, mask
        if ZEROS:
            zero = tl.load(zeros + index, mask=valid, other=0).to(tl.float32)
        else:
            zero = MIDDLE
        value = level_of(code, zero, table, BITS, MANTISSA, UNIT, LEVELS)
        if not WHOLE:
            value = value * step_at(scale, index, valid, SCALE)
        return value
