"""Bits and floats: dense bit packing and small floating-point codecs. The only file that knows bit patterns.

Everything is vectorised over elements; nothing here knows schemes, models or files.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class FloatFormat:
    """A floating-point format of at most 8 bits: sign, exponent and mantissa bits, all codes of it.

    `maximum` is the largest finite value; encoding saturates there. Sources: OCP 8-bit Floating Point Specification 1.0
    (e4m3, e5m2) and OCP Microscaling Formats 1.0 (e2m1, e2m3, e3m2).
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    maximum: float

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def maximum_exponent(self) -> int:
        """Exponent of the largest finite value: `emax` of the OCP MX specification."""
        return int(torch.tensor(self.maximum).frexp().exponent) - 1


E4M3 = FloatFormat("e4m3", 4, 3, 448.0)
E5M2 = FloatFormat("e5m2", 5, 2, 57344.0)
E2M1 = FloatFormat("e2m1", 2, 1, 6.0)
E2M3 = FloatFormat("e2m3", 2, 3, 7.5)
E3M2 = FloatFormat("e3m2", 3, 2, 28.0)


def cpu_has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices itself; where it does not, float32 is faster."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def round_to_integers(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """`x` rounded to integers, in place: to nearest, ties to even; or, with a generator, up with probability `x - floor(x)`."""
    if generator is None:
        return x.round_()
    below = x.floor()
    # compared, not added: a sum would round, and integers must stay
    return below.add_(chance(x, generator) < x.sub_(below))


def chance(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers in [0, 1), one for each element of `x`: the same on every device."""
    return torch.rand(x.shape, generator=generator, device=generator.device).to(x.device)


def encode_float(x: Tensor, target: FloatFormat, generator: torch.Generator | None = None) -> Tensor:
    """Codes (uint8, sign in the highest of the format's bits) of float32 `x`, rounded to nearest even or stochastically,
    saturated at the largest finite value. NaN is not allowed in `x`."""
    magnitude = x.abs().clamp_(max=target.maximum)
    # the exponent field of a float32 is its binade; below the format's smallest normal the step stays the same
    smallest = 1 - target.bias
    exponent = magnitude.view(torch.int32).bitwise_right_shift(23).sub_(127).clamp_(min=smallest)
    step = (exponent + (127 - target.mantissa_bits)).bitwise_left_shift_(23).view(torch.float32)
    units = round_to_integers(magnitude.div_(step), generator)  # exact: the step is a power of two
    # `units` holds the implicit bit, so a carry moves into the exponent by itself
    codes = exponent.sub_(smallest).bitwise_left_shift_(target.mantissa_bits).add_(units.to(torch.int32))
    sign = x.view(torch.int32).bitwise_right_shift(31).bitwise_and_(1).bitwise_left_shift_(target.bits - 1)
    return codes.bitwise_or_(sign).to(torch.uint8)


@cache
def float_values(source: FloatFormat) -> Tensor:
    """The value of every code, float32 `[2 ** bits]`. Codes above the maximum are NaN, or infinite in e5m2."""
    codes = torch.arange(2 ** (source.bits - 1))
    exponent, mantissa = codes >> source.mantissa_bits, codes & (2**source.mantissa_bits - 1)
    fraction = mantissa / 2**source.mantissa_bits
    normal = torch.ldexp(1 + fraction, exponent - source.bias)
    values = torch.where(exponent == 0, torch.ldexp(fraction, torch.tensor(1 - source.bias)), normal).float()
    over = values > source.maximum
    infinite = over & (mantissa == 0) & (exponent == 2**source.exponent_bits - 1) & (source.mantissa_bits == 2)
    values = torch.where(over, torch.where(infinite, torch.inf, torch.nan), values)
    return torch.cat([values, -values])


def decode_float(codes: Tensor, source: FloatFormat) -> Tensor:
    """Float32 values of uint8 codes, any shape."""
    return look_up(float_values(source), codes)


def look_up(table: Tensor, codes: Tensor) -> Tensor:
    """`table[codes]` for uint8 codes of any shape, float32."""
    return table.to(codes.device).index_select(0, codes.reshape(-1).int()).view(codes.shape)


def round_through(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Positive `x` rounded to `dtype`, never to zero: what underflows becomes the dtype's smallest number; that is a
    denormal in float16 only (its normals end at 6e-5, above the scales of many weights)."""
    info = torch.finfo(dtype)
    smallest = info.tiny * info.eps if dtype is torch.float16 else info.tiny
    return x.clamp(min=smallest, max=info.max).to(dtype)


def count_bfloat16(x: Tensor) -> Tensor:
    """How often each bfloat16 occurs among finite values `x`, any shape, rounded to it: int64 `[65536]`, by code."""
    largest = torch.finfo(torch.bfloat16).max
    counts = torch.zeros(1 << 16, dtype=torch.int64, device=x.device)
    for piece in x.reshape(-1).split(1 << 20):
        codes = piece.bfloat16().clamp(-largest, largest).view(torch.int16).int().bitwise_and_(0xFFFF)
        counts += torch.bincount(codes, minlength=1 << 16)
    return counts


def counted_values(counts: Tensor) -> tuple[Tensor, Tensor]:
    """The values that `count_bfloat16` counted, float32, rising, and how often each occurs, int64; on the CPU."""
    codes = counts.cpu().nonzero().squeeze(-1)
    values, order = codes.to(torch.int16).view(torch.bfloat16).float().sort()
    return values, counts.cpu()[codes[order]]


PIECE = 1 << 18  # codes packed at a time: what is in between stays in a core's cache


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take in whole 32-bit words."""
    return -(-count * bits // 32) * 4


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Dense little-endian bit stream of each row: code `i` occupies bits `[i * bits, (i + 1) * bits)`.

    `codes`: uint8 `[rows, count]`, all below `2 ** bits`; int32 for 16 bits. Returns uint8 `[rows, packed_bytes(count, bits)]`;
    each row is padded with zeros to a 32-bit word. Equals compressed-tensors' `pack_to_int32` (0.18 and later) viewed as bytes.
    """
    rows, count = codes.shape
    if bits == 16:
        return pack_bits(codes.to(torch.uint16).view(torch.uint8), 8)
    at_once = max(1, PIECE // max(1, count))
    if rows > at_once:
        return torch.cat([pack_bits(part, bits) for part in codes.split(at_once)])
    width = packed_bytes(count, bits)
    if bits == 8:
        return torch.nn.functional.pad(codes, (0, width - count)).reshape(-1).view(rows, width)
    # flat, here and at the end: a single row may have any stride, and then it has no view as words
    codes = torch.nn.functional.pad(codes, (0, -count % 8)).reshape(-1)
    if bits == 4:  # the most common width, in a fifth of the time: the low byte of `pair | pair >> 4` holds both codes
        pairs = codes.view(torch.int16)
        packed = pairs.bitwise_right_shift(4).bitwise_or_(pairs).to(torch.uint8).view(rows, -1)
        return torch.nn.functional.pad(packed, (0, width - packed.shape[1])).reshape(-1).view(rows, width)
    lanes = codes.view(torch.int64)
    # eight codes in eight bytes: close the gaps between pairs, then between fours, then between eights
    lanes = (lanes & 0x00FF00FF00FF00FF) | ((lanes >> (8 - bits)) & (0x00FF00FF00FF00FF << bits))
    lanes = (lanes & 0x0000FFFF0000FFFF) | ((lanes >> (16 - 2 * bits)) & (0x0000FFFF0000FFFF << 2 * bits))
    lanes = (lanes & 0xFFFFFFFF) | ((lanes >> 32) << (4 * bits))
    packed = lanes.view(torch.uint8).view(rows, -1, 8)[:, :, :bits].reshape(rows, -1)
    cut = torch.nn.functional.pad(packed, (0, width - packed.shape[1]))  # negative: cuts what the last eight add
    return cut.reshape(-1).view(rows, width)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_bits`: uint8 `[rows, count]`, int32 for 16 bits."""
    if bits == 16:
        return unpack_bits(packed, 8, 2 * count).view(torch.uint16).to(torch.int32)
    if bits == 8:
        return packed[:, :count].contiguous()
    rows, eights = packed.shape[0], -(-count // 8)
    stream = torch.nn.functional.pad(packed, (0, max(0, eights * bits - packed.shape[1])))[:, : eights * bits]
    lanes = torch.nn.functional.pad(stream.reshape(rows, eights, bits), (0, 8 - bits)).contiguous().view(torch.int64)
    half, quarter, mask = (1 << 4 * bits) - 1, (1 << 2 * bits) - 1, (1 << bits) - 1
    lanes = (lanes & half) | ((lanes >> (4 * bits) & half) << 32)
    pairs = quarter * 0x0000000100000001
    lanes = (lanes & pairs) | ((lanes >> (2 * bits) & pairs) << 16)
    ones = mask * 0x0001000100010001
    lanes = (lanes & ones) | ((lanes >> bits & ones) << 8)
    return lanes.view(torch.uint8).view(rows, -1)[:, :count].contiguous()
