"""`y = x W^T` from packed codes, in Triton: for few tokens as sums of products, for more on matrix units, for many by writing the
weight out once for the float product. Weights stay as many bits as they have; sums are float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from quantplan.gpu import interpreted
from quantplan.gpu.levels import Levels, level_table, levels_of
from quantplan.gpu.values import step_at, weights
from quantplan.numerics import pack_bits, unpack_bits
from quantplan.scheme import BLOCK
from quantplan.tensor import QuantizedTensor

Way = Literal["gemv", "gemm", "dense"]

# Where one way gives over to the next, in tokens. From arithmetic, not from measurements: scripts/bench/gpu prints all three.
FEW = 4
MANY = 512
PROCESSORS = 128  # about as many as a large GPU has; columns are split among programs until there are that many


@triton.jit
def _gemv(
    x, words, scale, divisor, zeros, table, y,
    x_m, x_k, rows, columns, pitch, across, tall, wide,
    BITS: tl.constexpr, LEVELS: tl.constexpr, MANTISSA: tl.constexpr, UNIT: tl.constexpr, SCALE: tl.constexpr,
    ZEROS: tl.constexpr, WHOLE: tl.constexpr, BY_WORD: tl.constexpr, DIVIDED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One token's products with `BLOCK_N` rows."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1).to(tl.int64)
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for k0 in range(0, columns, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        inputs = tl.load(x + m * x_m + k * x_k, mask=k < columns, other=0).to(tl.float32)
        sums += inputs[None, :] * weights(
            words, scale, zeros, table, n, k0, rows, columns, pitch, across, tall, wide,
            BITS, LEVELS, MANTISSA, UNIT, SCALE, ZEROS, WHOLE, BY_WORD, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    products = tl.sum(sums, 1)
    if WHOLE:
        products = products * step_at(scale, (n // tall) * across, n < rows, SCALE)
    if DIVIDED:
        products = products / tl.load(divisor)
    tl.store(y + m * rows + n, products.to(y.dtype.element_ty), mask=n < rows)


@triton.jit
def _gemm(
    x, words, scale, divisor, zeros, table, y,
    x_m, x_k, tokens, rows, columns, pitch, across, tall, wide, share,
    BITS: tl.constexpr, LEVELS: tl.constexpr, MANTISSA: tl.constexpr, UNIT: tl.constexpr, SCALE: tl.constexpr,
    ZEROS: tl.constexpr, WHOLE: tl.constexpr, BY_WORD: tl.constexpr, DIVIDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDENED: tl.constexpr,
):  # fmt: skip
    """A tile of the product, over `share` columns: y is `[parts, tokens, rows]`, to be summed."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    lines = x + m.to(tl.int64)[:, None] * x_m
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(part * share, tl.minimum(part * share + share, columns), BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)[None, :]
        inputs = tl.load(lines + k * x_k, mask=(m < tokens)[:, None] & (k < columns), other=0)
        tile = weights(
            words, scale, zeros, table, n, k0, rows, columns, pitch, across, tall, wide,
            BITS, LEVELS, MANTISSA, UNIT, SCALE, ZEROS, WHOLE, BY_WORD, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        tile = tile.to(inputs.dtype)
        if WIDENED:  # Triton's interpreter cannot multiply bfloat16
            inputs, tile = inputs.to(tl.float32), tile.to(tl.float32)
        # float32 inputs are multiplied as such, not as tf32
        sums = tl.dot(inputs, tl.trans(tile), sums, input_precision="ieee")
    if WHOLE:
        sums = sums * step_at(scale, (n // tall) * across, n < rows, SCALE)[None, :]
    if DIVIDED:
        sums = sums / tl.load(divisor)
    at = (part.to(tl.int64) * tokens + m)[:, None] * rows + n[None, :]
    tl.store(y + at, sums.to(y.dtype.element_ty), mask=(m < tokens)[:, None] & (n < rows)[None, :])


@triton.jit
def _dequantize(
    words, scale, divisor, zeros, table, y,
    rows, columns, pitch, across, tall, wide,
    BITS: tl.constexpr, LEVELS: tl.constexpr, MANTISSA: tl.constexpr, UNIT: tl.constexpr, SCALE: tl.constexpr,
    ZEROS: tl.constexpr, BY_WORD: tl.constexpr, DIVIDED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of the weight itself."""
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k0 = tl.program_id(0) * BLOCK_K
    tile = weights(
        words, scale, zeros, table, n, k0, rows, columns, pitch, across, tall, wide,
        BITS, LEVELS, MANTISSA, UNIT, SCALE, ZEROS, False, BY_WORD, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if DIVIDED:
        tile = tile / tl.load(divisor)
    k = k0 + tl.arange(0, BLOCK_K)[None, :]
    at = n.to(tl.int64)[:, None] * columns + k
    tl.store(y + at, tile.to(y.dtype.element_ty), mask=(n < rows)[:, None] & (k < columns))


@dataclass(frozen=True)
class Packed:
    """A weight `[rows, columns]` on a GPU as its kernels want it: `words`, int32 `[rows, words]`, is the dense bit stream of
    native checkpoints; `tall` rows and `wide` columns share one of `scale` `[down, across]`, kept as it is stored."""

    words: Tensor
    scale: Tensor
    divisor: Tensor | None
    zeros: Tensor | None
    table: Tensor | None
    levels: Levels
    columns: int
    tall: int
    wide: int

    def codes(self) -> Tensor:
        """The codes, uint8 `[rows, columns]`."""
        return unpack_bits(self.words.view(torch.uint8), self.levels.bits, self.columns)


def pack(quantized: QuantizedTensor) -> Packed:
    """A quantized matrix packed, where it lies."""
    rows, columns = quantized.shape
    scheme, params = quantized.scheme, quantized.params
    down, across = scheme.grid(rows, columns)
    tall, wide = (BLOCK, BLOCK) if scheme.strategy == "block" else (rows // down, columns // across)
    levels = levels_of(scheme)
    return Packed(
        pack_bits(quantized.codes, scheme.bits).view(torch.int32),
        *_scales(quantized),
        params["zero_point"].contiguous() if "zero_point" in params else None,
        level_table(scheme).to(quantized.codes.device) if levels.kind == "table" else None,
        levels,
        columns,
        tall,
        wide,
    )


def _scales(quantized: QuantizedTensor) -> tuple[Tensor, Tensor | None]:
    """Scales as they are stored where kernels read that, and what divides them all; else steps in float32."""
    params = quantized.params
    names, dtype = set(params) - {"zero_point"}, params["scale"].dtype if "scale" in params else None
    if names == {"scale", "global_scale"} and dtype is torch.float8_e4m3fn:
        return params["scale"].contiguous().view(torch.uint8), params["global_scale"]
    if names == {"scale"} and dtype in (torch.bfloat16, torch.float16, torch.float32):
        return params["scale"].contiguous(), None
    step = quantized.scheme.quantizer().step(dict(params)).float()
    if (
        names == {"scale"}
        and dtype is torch.uint8
        and torch.equal(step, torch.ldexp(torch.ones_like(step), params["scale"].int() - 127))
    ):
        return params["scale"].contiguous(), None
    return step.contiguous(), None


def matmul(x: Tensor, weight: Packed, way: Way | None = None) -> Tensor:
    """`x W^T`: `[tokens, columns]` -> `[tokens, rows]` in the dtype of `x`, bfloat16, float16 or float32. `way`: by the number of
    tokens where none is given. No gradient."""
    chosen = way or ("gemv" if x.shape[0] <= FEW else "gemm" if x.shape[0] < MANY else "dense")
    levels = weight.levels
    # under torch.compile one opaque operation; else without the dispatcher's share of the time
    call = torch.ops.quantplan.matmul_packed if torch.compiler.is_compiling() else _matmul
    return call(
        x, weight.words, weight.scale, weight.divisor, weight.zeros, weight.table,
        levels.kind, levels.bits, levels.mantissa, levels.unit, weight.tall, weight.wide, chosen,
    )  # fmt: skip


def dequantize(weight: Packed, dtype: torch.dtype) -> Tensor:
    """The weight `[rows, columns]` in `dtype`."""
    shapes, options = _described(weight)
    rows, columns = len(weight.words), weight.columns
    y = torch.empty(rows, columns, dtype=dtype, device=weight.words.device)
    block_n, block_k = 16, max(256, options.pop("PER"))
    options.pop("WHOLE")
    with torch.cuda.device_of(y):
        _dequantize[(triton.cdiv(columns, block_k), triton.cdiv(rows, block_n))](
            *_tensors(weight), y, rows, *shapes, **options, BLOCK_N=block_n, BLOCK_K=block_k
        )
    return y


def _tensors(weight: Packed) -> tuple[Tensor, ...]:
    """What every kernel reads; what is not there is never read, and any address will do."""
    w = weight
    return w.words, w.scale, *(w.words if t is None else t for t in (w.divisor, w.zeros, w.table))


def _described(weight: Packed) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Columns, words a row, scales a row, rows and columns that share one; and what the kernels are compiled for."""
    w, levels = weight, weight.levels
    per = 32 // levels.bits if 32 % levels.bits == 0 else 0
    whole = w.wide >= w.columns
    options = {
        "BITS": levels.bits,
        "LEVELS": levels.kind,
        "MANTISSA": levels.mantissa,
        "UNIT": levels.unit,
        "SCALE": _stored(w),
        "ZEROS": w.zeros is not None,
        "WHOLE": whole,
        "BY_WORD": bool(per) and (whole or w.wide % per == 0),
        "DIVIDED": w.divisor is not None,
        "PER": per,
    }
    across = w.scale.shape[1] if w.scale.dim() > 1 else 1
    return (w.columns, w.words.shape[1], across, w.tall, w.wide), options


def _stored(weight: Packed) -> Literal["float", "e8m0", "e4m3"]:
    if weight.scale.dtype is not torch.uint8:
        return "float"
    return "e8m0" if weight.divisor is None else "e4m3"


@torch.library.custom_op("quantplan::matmul_packed", mutates_args=())
def _operation(
    x: Tensor, words: Tensor, scale: Tensor, divisor: Tensor | None, zeros: Tensor | None, table: Tensor | None,
    kind: str, bits: int, mantissa: int, unit: float, tall: int, wide: int, way: str,
) -> Tensor:  # fmt: skip
    """`matmul` for torch.compile, which does not look inside."""
    return _matmul(x, words, scale, divisor, zeros, table, kind, bits, mantissa, unit, tall, wide, way)


@_operation.register_fake
def _(x: Tensor, words: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape[0], words.shape[0])


def _matmul(
    x: Tensor, words: Tensor, scale: Tensor, divisor: Tensor | None, zeros: Tensor | None, table: Tensor | None,
    kind: Any, bits: int, mantissa: int, unit: float, tall: int, wide: int, way: str,
) -> Tensor:  # fmt: skip
    tokens, rows = x.shape[0], words.shape[0]
    weight = Packed(words, scale, divisor, zeros, table, Levels(kind, bits, mantissa, unit), x.shape[1], tall, wide)
    if not tokens:
        return x.new_empty(0, rows)
    if way == "dense":
        return functional.linear(x, dequantize(weight, x.dtype))
    with torch.cuda.device_of(x):
        return (_launch_gemv if way == "gemv" else _launch_gemm)(x, weight)


def _launch_gemv(x: Tensor, weight: Packed) -> Tensor:
    shapes, options = _described(weight)
    tokens, rows = x.shape[0], len(weight.words)
    per = options.pop("PER")
    most = 128 * per if options["BY_WORD"] else 512  # a word of each row for every thread
    block_n, block_k = 4, max(per, min(most, triton.next_power_of_2(weight.columns)))
    y = x.new_empty(tokens, rows)
    _gemv[(triton.cdiv(rows, block_n), tokens)](
        x, *_tensors(weight), y, *x.stride(), rows, *shapes, **options, BLOCK_N=block_n, BLOCK_K=block_k
    )
    return y


def _launch_gemm(x: Tensor, weight: Packed) -> Tensor:
    shapes, options = _described(weight)
    tokens, rows, columns = x.shape[0], len(weight.words), weight.columns
    options.pop("PER")
    wide = x.dtype is torch.float32  # has no matrix units, and registers for a smaller tile
    block_m = max(16, min(32 if wide else 64, triton.next_power_of_2(tokens)))
    # longer tiles read more of a row at once; wherever else, they would take registers that are not there
    long = block_m == 16 and options["BY_WORD"] and weight.levels.bits <= 4 and weight.levels.kind != "table"
    block_n, block_k = (32, 32) if wide else (64, 128 if long else 64)
    across, down = triton.cdiv(tokens, block_m), triton.cdiv(rows, block_n)
    parts = max(1, min(PROCESSORS // (across * down), columns // (4 * block_k)))
    share = triton.cdiv(triton.cdiv(columns, parts), block_k) * block_k
    parts = triton.cdiv(columns, share)
    y = x.new_empty(parts, tokens, rows, dtype=x.dtype if parts == 1 else torch.float32)
    _gemm[(across, down, parts)](
        x, *_tensors(weight), y, *x.stride(), tokens, rows, *shapes, share, **options,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, WIDENED=interpreted(),
        num_stages=3 if options["BY_WORD"] else 2,  # without, each code is a load on its way
    )  # fmt: skip
    return y[0] if parts == 1 else y.sum(0).to(x.dtype)
