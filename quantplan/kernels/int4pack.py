"""int4pack: integers of any width and small floats, in groups, by torch's 4-bit operation for CPUs; bfloat16 inputs.

The operation computes `x w^T` with `w = (u - 8) * scale + shift`: `u` a 4-bit code, scale and shift bfloat16, one of each for a
group of columns. A grid's values are a step times integer levels. Levels that do not fit one code are written as two, and the
operation is given its inputs twice: one call, summed in float32 and rounded once. Wide integers are two digits, `16 high + low`;
levels that hardly exceed 4 bits, as e2m1's (up to 12 halves), are two terms with the same scale, which also fills groups of 16 up
to 32, the operation's smallest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from quantplan.kernel import KERNELS, Job, Kernel
from quantplan.numerics import cpu_has_bfloat16, look_up
from quantplan.scheme import Params, SchemeConfig
from quantplan.tensor import QuantizedTensor

GROUPS = (256, 128, 64, 32)  # columns that may share a scale in the operation
HALF = 16  # a group that two terms fill up to 32
ROWS = 16  # it takes rows in multiples of these
DENSE = 96  # tokens from which on dequantizing once and a float product are faster
BLOCKS = 64  # rows, the most the operation interleaves: pieces of a matrix start at multiples of it
PIECE = 1 << 20  # weights dequantized at a time: what caches hold, and memory that the process has kept
UNITS = (1.0, 0.5, 0.25, 0.125, 0.0625)


@dataclass(frozen=True)
class _Levels:
    """A grid as integers: `value = step * unit * (level - zero point)`, `level[code] = base + u[code]`, u not negative."""

    u: Tensor  # float32 `[codes]`, for `look_up`
    base: int
    unit: float
    parts: Literal["one", "terms", "digits"]

    @property
    def first(self) -> int | None:
        """What is added to a code, where that is all there is to it."""
        first = int(self.u[0])
        return first if torch.equal(self.u, torch.arange(first, first + len(self.u)).float()) else None

    @property
    def middle(self) -> int:
        """What the operation takes from `u`, however that is written."""
        return {"one": 8, "terms": 16, "digits": 136}[self.parts]


@KERNELS.register("int4pack")
class Int4Pack(Kernel):
    """Weights as 4-bit codes, one or two of them for a level, and 4 bytes for each group."""

    rank: ClassVar[int] = 30

    @classmethod
    def refuse(cls, job: Job) -> str | None:
        if job.device.type != "cpu":
            return f"it runs on the cpu, not on {job.device.type}"
        if job.dtype is not torch.bfloat16:
            return f"inputs are {str(job.dtype).removeprefix('torch.')}, and it is fast for bfloat16 alone"
        if job.rows % ROWS:
            return f"{job.rows} rows are no multiple of {ROWS}"
        if job.wq.strategy == "block":
            return "it has no scales of 128x128 blocks"
        if _levels(job.wq) is None:
            return f"the levels of {job.wq.name} are not few integers"
        if not job.wq.symmetric_grid and not job.wq.name.startswith("int"):
            return f"{job.wq.name} with a zero point moves levels that are not evenly spaced"
        if _group(job) is None:
            return f"{job.wq.name} in groups of {job.wq.group or job.columns} columns does not fall into groups of 32"
        return "this torch lays 4-bit codes out in an unknown way" if _block() is None else None

    def __init__(self, quantized: QuantizedTensor, job: Job, inputs: Params) -> None:
        levels, group = _levels(job.wq), _group(job)
        assert levels is not None and group is not None
        self.levels, self.columns, self.rows = levels, job.columns, job.rows
        self.group, self.within = max(group, GROUPS[-1]), group == HALF
        step = job.wq.quantizer().step(dict(quantized.params)).float()
        zero = quantized.params.get("zero_point")
        scale = step * levels.unit
        shift = scale * (levels.base + levels.middle - (0 if zero is None else zero.float()))
        across = job.columns // group
        scale, shift = (p.expand(job.rows, -1).repeat_interleave(across // p.shape[1], 1) for p in (scale, shift))
        u = quantized.codes + levels.first if levels.first is not None else look_up(levels.u, quantized.codes).to(torch.uint8)
        first, second = self._written(u)
        codes = first
        if self.within:
            codes, shift = _side_by_side(first, second), shift / 2  # which both terms bring
        elif levels.parts != "one":
            codes = torch.cat([first, second], 1)
            scale = torch.cat([scale if levels.parts == "terms" else 16 * scale, scale], 1)
            shift = torch.cat([torch.zeros_like(shift), shift], 1)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        self.scales = torch.stack([scale.t(), shift.t()], -1).bfloat16().contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] >= DENSE:
            product = torch.bfloat16 if cpu_has_bfloat16() else torch.float32
            x, some = x.to(product), max(BLOCKS, PIECE // self.columns // BLOCKS * BLOCKS)
            made = (x @ self._dense(product, first, first + some) for first in range(0, self.rows, some))
            return torch.cat([y.bfloat16() for y in made], 1)
        if self.packed.shape[1] * 2 > self.columns:
            x = _side_by_side(x, x) if self.within else torch.cat([x, x], 1)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), self.packed, self.group, self.scales)

    @property
    def holds_codes(self) -> bool:
        return len(self.levels.u.unique()) == len(self.levels.u)  # 0 and -0 are one level

    def codes(self) -> Tensor:
        first, second = self._parts(_unpack(self.packed, self.rows))
        if self.levels.parts == "one" or second is None:
            u = first
        else:
            u = (16 if self.levels.parts == "digits" else 1) * first + second
        back = torch.zeros(256)
        back[self.levels.u.int()] = torch.arange(len(self.levels.u), dtype=torch.float32)
        return look_up(back, u).to(torch.uint8).t().contiguous()

    def _written(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """`u` as one code and the zero, or two, uint8."""
        if self.levels.parts == "one":
            return u, torch.full_like(u, 8)
        if self.levels.parts == "digits":
            return u >> 4, u & 15
        first = u.int().sub_(8).clamp_(0, 15).to(torch.uint8)
        return first, u - first

    def _parts(self, codes: Tensor) -> tuple[Tensor, Tensor | None]:
        """What `_written` gave, `[columns, rows]`, from codes `[columns or twice, rows]`."""
        if self.within:
            pairs = codes.unflatten(0, (-1, 2, HALF))
            return pairs[:, 0].flatten(0, 1), pairs[:, 1].flatten(0, 1)
        if len(codes) == self.columns:
            return codes, None
        return codes[: self.columns], codes[self.columns :]

    def _dense(self, dtype: torch.dtype, first_row: int, end: int) -> Tensor:
        """Rows of the dequantized matrix, transposed: `[columns, rows]`."""
        packed = self.packed[first_row:end]
        scale, shift = (p.contiguous().unsqueeze(1) for p in self.scales[:, first_row:end].unbind(-1))  # [groups, 1, rows]
        exact = self.levels.parts == "one" and not self.within and not shift.any()  # one rounding, whatever the dtype
        sums = dtype if exact else torch.float32
        values = _unpack(packed, len(packed)).view(torch.int8).sub_(8).unflatten(0, (-1, self.group)) * scale.to(sums)
        if not exact:
            values += shift
        first, second = self._parts(values.flatten(0, 1))
        return (first if second is None else first + second).to(dtype)


def _side_by_side(a: Tensor, b: Tensor) -> Tensor:
    """Two matrices `[rows, columns]` as one, 16 columns of each in turn."""
    return torch.stack([a.unflatten(1, (-1, HALF)), b.unflatten(1, (-1, HALF))], 2).flatten(1)


def _group(job: Job) -> int | None:
    """Columns that share a scale in the operation; 16 where a second term has to fill them up; None where none will do."""
    whole = job.wq.group or job.columns
    found = next((g for g in GROUPS if whole % g == 0), None)
    if found is not None or whole % HALF:
        return found
    levels = _levels(job.wq)
    return HALF if levels is not None and levels.parts != "digits" else None


@cache
def _levels(wq: SchemeConfig) -> _Levels | None:
    """The grid as integers; None where its values are not small multiples of one unit."""
    quantizer = wq.quantizer()
    probe = quantizer.fit(torch.tensor([-1.0, 1.0]), absmax=torch.tensor(1.0))
    values = quantizer.decode(torch.arange(2**wq.bits, dtype=torch.uint8), probe) / quantizer.step(probe)
    values = values + probe["zero_point"].float() if "zero_point" in probe else values
    for unit in UNITS:
        levels = (values / unit).round()
        if torch.isfinite(levels).all() and torch.allclose(levels * unit, values, rtol=1e-6):
            break
    else:
        return None
    low, high = int(levels.min()), int(levels.max())
    if high - low < 16:
        base = -8 if low >= -8 and high < 8 else low  # where zero is the middle, the shift is none
        return _Levels(levels - base, base, unit, "one")
    if low >= -16 and high <= 14:
        return _Levels(levels + 16, -16, unit, "terms")
    if high - low < 256:
        base = -128 if low >= -128 and high < 128 else low
        return _Levels(levels - base, base, unit, "digits")
    return None


@cache
def _block() -> int | None:
    """Rows that the operation interleaves on this processor, found by trying: byte j of a block holds rows j and j + half of it;
    where rows are left, and where there are no blocks (1), pairs of neighbours. None where it is none of these."""
    rows, columns = 80, 32
    codes = torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return next((b for b in (64, 32, 1) if torch.equal(_unpack(packed, rows, b), codes.t().to(torch.uint8))), None)


def _unpack(packed: Tensor, rows: int, block: int | None = None) -> Tensor:
    """The codes of the operation's layout, uint8 `[columns, rows]`."""
    block = block or _block() or 1
    columns = packed.shape[1] * 2
    whole = rows // block * block if block > 1 else 0
    flat = packed.reshape(-1)
    blocks = flat[: whole * columns // 2].view(-1, 1, columns, block // 2) if whole else flat[:0].view(0, 1, columns, 0)
    pairs = flat[whole * columns // 2 :].view(columns, -1)
    codes = torch.empty(columns, rows, dtype=torch.uint8)
    if whole:
        by_block = codes[:, :whole].view(columns, -1, 2, block // 2)
        by_block[:, :, 0] = (blocks[:, 0] & 15).transpose(0, 1)
        by_block[:, :, 1] = (blocks[:, 0] >> 4).transpose(0, 1)
    codes[:, whole::2] = pairs & 15
    codes[:, whole + 1 :: 2] = pairs >> 4
    return codes
