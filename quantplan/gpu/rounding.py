"""Rounding to grids on a GPU, in Triton: ranges, parameters, codes and values in one kernel over groups, and codes packed. Every
number is the one that the scheme's quantizer computes on the CPU, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantplan.gpu.levels import format_of, level_table, levels_of
from quantplan.gpu.values import float_of, level_of, power_of
from quantplan.numerics import E2M1, packed_bytes
from quantplan.scheme import SchemeConfig, check_finite
from quantplan.tensor import QuantizedTensor

NAMES = (*(f"int{bits}" for bits in range(2, 9)), "fp8", "fp4", "nf4", "nvfp4", "mxfp4", "mxfp6", "mxfp8")
TILE = 4096  # values a program holds at a time
LONGEST = 16384  # a group of at most so many is read once
TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _nearest_integer(x):
    """To nearest, ties to even, of values within +-2^22: what is below one falls off when they are added to 1.5 * 2^23."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _rounded_to(x, DTYPE: tl.constexpr):
    """float32 rounded to a dtype, as float32, ties to even; bfloat16 by its bits, as Triton's interpreter would cut them off."""
    if DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(DTYPE).to(tl.float32)


@triton.jit
def _float_code(x, MANTISSA: tl.constexpr, BITS: tl.constexpr, BIAS: tl.constexpr, MOST: tl.constexpr):
    """`numerics.encode_float`: codes of small floats, int32."""
    magnitude = tl.minimum(tl.abs(x), MOST)
    exponent = tl.maximum((magnitude.to(tl.int32, bitcast=True) >> 23) - 127, 1 - BIAS)
    step = ((exponent + (127 - MANTISSA)) << 23).to(tl.float32, bitcast=True)
    units = _nearest_integer(tl.div_rn(magnitude, step)).to(tl.int32)
    sign = (x.to(tl.int32, bitcast=True) >> 31) & 1
    return (((exponent - (1 - BIAS)) << MANTISSA) + units) | (sign << (BITS - 1))


@triton.jit
def _fitted(
    top, low, high, whole,
    RULE: tl.constexpr, DTYPE: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr, SHARE: tl.constexpr,
    EMAX: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """`Quantizer.fit` of groups with these extremes: what is stored, as a number (a scale, or the byte of an e8m0 or e4m3 scale),
    and the zero point."""
    zero = tl.zeros_like(top)
    if RULE == "e8m0":
        byte = (top.to(tl.int32, bitcast=True) >> 23) - EMAX
        stored = tl.where(top == 0, 127, tl.minimum(tl.maximum(byte, 0), 254)).to(tl.float32)
    elif RULE == "e4m3":
        stored = tl.maximum(_float_code((top * SHARE) * whole, 3, 8, 7, 448.0), 1).to(tl.float32)
    elif RULE == "range":
        spread = tl.div_rn(high - low, zero + LEVELS)
        stored = _rounded_to(tl.minimum(tl.maximum(spread, SMALLEST), LARGEST), DTYPE)
        stored = tl.where(low == high, 1.0, stored)
        zero = tl.minimum(tl.maximum(_nearest_integer(tl.div_rn(-low, stored)), 0.0), LEVELS)
    else:
        stored = _rounded_to(tl.minimum(tl.maximum(top * SHARE, SMALLEST), LARGEST), DTYPE)
        stored = tl.where(top == 0, 1.0, stored)
    return stored, zero


@triton.jit
def _coded(
    x, step, zero, edges,
    KIND: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, MOST: tl.constexpr,
    QUOTIENT: tl.constexpr,
):  # fmt: skip
    """`Quantizer.encode`: int32 codes of `[groups, size]` values."""
    units = tl.div_rn(x, step + tl.zeros_like(x))
    if KIND == "float":
        return _float_code(units, MANTISSA, BITS, BIAS, MOST)
    elif KIND == "table":
        code = tl.zeros_like(x).to(tl.int32)
        for i in tl.static_range((1 << BITS) - 1):
            code += (units > tl.load(edges + i)).to(tl.int32)
        return code
    else:
        if QUOTIENT != tl.float32:
            units = _rounded_to(units, QUOTIENT)
        units = _nearest_integer(tl.minimum(tl.maximum(units, -1024.0), 1024.0))  # as far as any grid reaches
        return tl.minimum(tl.maximum(units + zero, 0.0), (1 << BITS) - 1.0).to(tl.int32)


@triton.jit
def _used(stored, zero, divisor, RULE: tl.constexpr, BITS: tl.constexpr):
    """Step and zero point that codes are computed with, `[groups, 1]`, from what is stored."""
    if RULE == "e8m0":
        step = power_of(stored.to(tl.int32))
    elif RULE == "e4m3":
        step = tl.div_rn(float_of(stored.to(tl.int32), 8, 3, 2.0**120), tl.zeros_like(stored) + divisor)
    else:
        step = stored
    if RULE != "range":
        zero = tl.zeros_like(step) + (1 << (BITS - 1))
    return step[:, None], zero[:, None]


@triton.jit
def _round(
    x, scales, zeros, whole, edges, table, written, faults, groups, size,
    FIT: tl.constexpr, RULE: tl.constexpr, DTYPE: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr,
    SHARE: tl.constexpr, EMAX: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr,
    BIAS: tl.constexpr, MOST: tl.constexpr, UNIT: tl.constexpr, QUOTIENT: tl.constexpr,
    CODES: tl.constexpr, ONCE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`BLOCK_G` groups of `x` `[groups, size]`. `FIT`: parameters are found and written, and faults (NaN where a value is not
    finite); else one set is read for all. `CODES`: codes are written, else values."""
    g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    inside = g < groups
    start = g.to(tl.int64)[:, None] * size
    column = tl.arange(0, BLOCK)[None, :]
    fits = inside[:, None] & (column < size)
    kept = tl.load(x + start + column, mask=fits, other=0).to(tl.float32)
    divisor = 1.0
    if RULE == "e4m3":
        divisor = tl.load(whole)
    if FIT:
        low, high = tl.min(kept, 1), tl.max(kept, 1)
        fault = tl.sum(kept * 0.0, 1)
        if not ONCE:
            for begin in range(BLOCK, size, BLOCK):
                more = tl.load(x + start + begin + column, mask=inside[:, None] & (begin + column < size), other=0).to(tl.float32)
                low, high = tl.minimum(low, tl.min(more, 1)), tl.maximum(high, tl.max(more, 1))
                fault += tl.sum(more * 0.0, 1)
        # zero is always in the range, as it is among what pads a tile
        low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
        stored, zero = _fitted(
            tl.maximum(-low, high), low, high, divisor, RULE, DTYPE, SMALLEST, LARGEST, SHARE, EMAX, (1 << BITS) - 1.0
        )
        tl.store(scales + g, stored.to(scales.dtype.element_ty), mask=inside)
        if RULE == "range":
            tl.store(zeros + g, zero.to(tl.uint8), mask=inside)
        tl.store(faults + g, fault, mask=inside)
    else:
        stored = tl.load(scales + g * 0).to(tl.float32)
        zero = tl.zeros_like(stored)
        if RULE == "range":
            zero = tl.load(zeros + g * 0).to(tl.float32)
    step, zero = _used(stored, zero, divisor, RULE, BITS)
    for begin in range(0, size, BLOCK):
        here = inside[:, None] & (begin + column < size)
        if not ONCE:
            kept = tl.load(x + start + begin + column, mask=here, other=0).to(tl.float32)
        code = _coded(kept, step, zero, edges, KIND, BITS, MANTISSA, BIAS, MOST, QUOTIENT)
        if CODES:
            tl.store(written + start + begin + column, code.to(tl.uint8), mask=here)
        else:
            level = level_of(code, zero, table, BITS, MANTISSA, UNIT, KIND)
            value = _rounded_to(level * step, written.dtype.element_ty)
            tl.store(written + start + begin + column, value.to(written.dtype.element_ty), mask=here)


@triton.jit
def _pack(codes, words, rows, count, width, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Words of the dense bit stream of each row: every code that has bits in a word is shifted to its place there."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, word = at // width, at % width
    first = word * 32 // BITS
    packed = tl.zeros((BLOCK,), tl.uint32)
    for i in tl.static_range(32 // BITS + (2 if 32 % BITS else 0)):
        index = first + i
        code = tl.load(codes + row * count + index, mask=(row < rows) & (index < count), other=0).to(tl.uint32)
        shift = index * BITS - word * 32  # from -BITS + 1; from 32 on the code is another word's
        left = code << tl.minimum(tl.maximum(shift, 0), 31).to(tl.uint32)
        right = code >> tl.minimum(tl.maximum(-shift, 0), 31).to(tl.uint32)
        packed |= tl.where(shift >= 32, 0, tl.where(shift >= 0, left, right)).to(tl.uint32)
    tl.store(words + at, packed.to(tl.int32, bitcast=True), mask=row < rows)


def refuse(scheme: SchemeConfig) -> str | None:
    """Why values are not rounded to a scheme's grid here, as part of a sentence; None when they are."""
    if scheme.name not in NAMES:
        return f"the arithmetic of {scheme.name} is not known"
    if not scheme.symmetric_grid and not scheme.name.startswith("int"):
        return f"the arithmetic of {scheme.name} with a zero point is not known"
    return "rounding is stochastic" if scheme.rounding != "nearest" else None


def fake_quantize(x: Tensor, scheme: SchemeConfig, absmax: Tensor | None = None) -> Tensor:
    """`Quantizer.fake_quantize`: `x` of any shape (its last axis is the columns) on the grid, in its dtype or `scheme.dtype`.
    Raises NonFinite."""
    dtype = getattr(torch, scheme.dtype) if scheme.dtype else x.dtype
    if x.numel() == 0:
        return x.to(dtype)
    values, _ = _fit_and_round(x.reshape(-1, x.shape[-1]), scheme, absmax, dtype)
    return values.reshape(x.shape)


def quantize(x: Tensor, scheme: SchemeConfig, absmax: Tensor | None = None) -> QuantizedTensor:
    """`Quantizer.quantize`: a matrix `[rows, columns]`, any float dtype, with fitted parameters. Raises NonFinite."""
    codes, params = _fit_and_round(x, scheme, absmax, None)
    return QuantizedTensor(codes.contiguous(), params, scheme)


def round_static(x: Tensor, scheme: SchemeConfig, params: Mapping[str, Tensor]) -> Tensor:
    """`Quantizer.round_static`: activations of any shape on the grid that `fit_static` gave, in their own dtype. Raises NonFinite
    where groups have scales of their own."""
    if x.numel() == 0:
        return x
    groups = x.reshape(-1, scheme.group or x.shape[-1])
    if scheme.tensor_params:
        return _fit(groups, scheme, dict(params), x.dtype)[0].view(x.shape)
    return _launch(groups, scheme, dict(params), None, x.dtype).view(x.shape)


def pack(codes: Tensor, bits: int) -> Tensor:
    """`numerics.pack_bits`: the dense bit stream of each row, uint8 `[rows, packed_bytes]`, lowest bits first, of uint8 codes."""
    rows, count = codes.shape
    width = packed_bytes(count, bits) // 4
    words = torch.empty(rows, width, dtype=torch.int32, device=codes.device)
    if words.numel():
        with torch.cuda.device_of(codes):
            _pack[(triton.cdiv(rows * width, 256),)](codes.contiguous(), words, rows, count, width, BITS=bits, BLOCK=256)
    return words.view(torch.uint8)


def _fit_and_round(
    x: Tensor, scheme: SchemeConfig, absmax: Tensor | None, dtype: torch.dtype | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """A matrix as values in `dtype`, or as codes where that is None, and its parameters as they are stored."""
    rows, columns = x.shape
    quantizer = scheme.quantizer()
    if scheme.strategy == "tensor":  # one range for all programs is found first; of a range, its ends are all that matters
        params = quantizer.fit(torch.stack(torch.aminmax(x)).float())
        return _launch(x, scheme, params, None, dtype), {n: p.reshape(1, 1) for n, p in params.items()}
    whole: dict[str, Tensor] = {}
    if scheme.needs_absmax:
        most = x.abs().amax().float() if absmax is None else absmax
        whole = {n: p for n, p in quantizer.fit(most.reshape(1), absmax=most).items() if n in scheme.tensor_params}
    groups = quantizer.groups(x)
    written, params = _fit(groups.reshape(-1, groups.shape[-1]), scheme, whole, dtype)
    shaped = {n: p if n in whole else p.view(groups.shape[:2]) for n, p in params.items()}
    return quantizer.ungroup(written.view(groups.shape), rows, columns), shaped


def _fit(
    groups: Tensor, scheme: SchemeConfig, whole: dict[str, Tensor], dtype: torch.dtype | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Groups `[groups, size]` rounded with parameters of their own, and these; `whole`: those of the whole tensor."""
    count = len(groups)
    rule = _rule(scheme)
    stored = torch.uint8 if rule in ("e8m0", "e4m3") else _scale_dtype(scheme)
    params = {"scale": torch.empty(count, dtype=stored, device=groups.device)}
    if rule == "range":
        params["zero_point"] = torch.empty(count, dtype=torch.uint8, device=groups.device)
    faults = torch.empty(count, device=groups.device)
    written = _launch(groups, scheme, params | whole, faults, dtype)
    check_finite(faults)
    if rule == "e4m3":
        params["scale"] = params["scale"].view(torch.float8_e4m3fn)
    return written, params | whole


def _launch(
    groups: Tensor, scheme: SchemeConfig, params: dict[str, Tensor], faults: Tensor | None, dtype: torch.dtype | None
) -> Tensor:
    """Runs the kernel over groups `[groups, size]`; without `faults`, with the one set of parameters that is given."""
    groups = groups.contiguous()
    count, size = groups.shape
    levels, known, dtype_of_scale = levels_of(scheme), format_of(scheme) or E2M1, _scale_dtype(scheme)
    edges = table = groups  # not read
    if levels.kind == "table":
        table = level_table(scheme).to(groups.device)
        edges = (table[1:] + table[:-1]) / 2
    written = torch.empty(groups.shape, dtype=dtype or torch.uint8, device=groups.device)
    once = size <= LONGEST
    block = triton.next_power_of_2(size) if once else TILE
    block_g = max(1, TILE // block)
    # as numerics.round_through: never to zero, never to infinity
    info = torch.finfo(dtype_of_scale)
    smallest = info.tiny * info.eps if dtype_of_scale is torch.float16 else info.tiny
    with torch.cuda.device_of(groups):
        _round[(triton.cdiv(count, block_g),)](
            groups, params["scale"], params.get("zero_point", groups), params.get("global_scale", groups), edges, table,
            written, groups if faults is None else faults, count, size,
            FIT=faults is not None, RULE=_rule(scheme), DTYPE=TYPES[dtype_of_scale], SMALLEST=smallest, LARGEST=info.max,
            SHARE=_share(scheme), EMAX=known.maximum_exponent, KIND=levels.kind, BITS=levels.bits, MANTISSA=known.mantissa_bits,
            BIAS=known.bias, MOST=known.maximum, UNIT=levels.unit,
            QUOTIENT=TYPES[getattr(torch, getattr(scheme, "quotient_dtype", "float32"))],
            CODES=dtype is None, ONCE=once, BLOCK_G=block_g, BLOCK=block, num_warps=4 if block <= TILE else 8,
        )  # fmt: skip
    return written


def _rule(scheme: SchemeConfig) -> str:
    """How parameters follow from a range."""
    if scheme.name.startswith("mx"):
        return "e8m0"
    return "e4m3" if scheme.tensor_params else "absmax" if scheme.symmetric_grid else "range"


def _share(scheme: SchemeConfig) -> float:
    """What a largest magnitude is multiplied by to get a step: one over the grid's own."""
    known = format_of(scheme)
    return 1.0 / getattr(scheme, "divisor", known.maximum if known else 1.0)


def _scale_dtype(scheme: SchemeConfig) -> torch.dtype:
    return getattr(torch, getattr(scheme, "scale_dtype", None) or "bfloat16")
