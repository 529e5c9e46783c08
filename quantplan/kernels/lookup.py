"""lookup: 4- and 8-bit codes of any scheme, dequantized two or four at a time by a table of 16 bits, for every batch.

There is no CPU operation for floats of 8 bits that is faster than this, and casting them one by one is five times as slow. Where
the scale is one for each row, it comes after the product.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from quantplan.kernel import KERNELS, Job, Kernel
from quantplan.numerics import pack_bits, unpack_bits
from quantplan.scheme import Params
from quantplan.tensor import QuantizedTensor

WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes -> what a table's entry is moved as


PIECE = 1 << 20  # weights dequantized at a time: what caches hold, and memory that the process has kept


@KERNELS.register("lookup")
class Lookup(Kernel):
    """Weights as they are stored."""

    rank: ClassVar[int] = 40

    @classmethod
    def refuse(cls, job: Job) -> str | None:
        if job.device.type != "cpu":
            return f"it runs on the cpu, not on {job.device.type}"
        if job.dtype not in (torch.bfloat16, torch.float32):
            return f"inputs are {str(job.dtype).removeprefix('torch.')}"
        if job.wq.bits not in (4, 8):
            return f"codes have {job.wq.bits} bits, not 4 or 8"
        if not job.wq.symmetric_grid:
            return "it knows no zero points"
        if job.wq.strategy == "block":
            return "it has no scales of 128x128 blocks"
        return f"{job.columns} columns are no multiple of 4" if job.columns % 4 else None

    def __init__(self, quantized: QuantizedTensor, job: Job, inputs: Params) -> None:
        self.bits, self.columns = job.wq.bits, job.columns
        quantizer = job.wq.quantizer()
        probe = quantizer.fit(torch.tensor([-1.0, 1.0]), absmax=torch.tensor(1.0))
        values = quantizer.decode(torch.arange(2**self.bits, dtype=torch.uint8), probe) / quantizer.step(probe)
        self.step = quantizer.step(dict(quantized.params)).float()
        exact = torch.equal(values.nan_to_num().bfloat16().float(), values.nan_to_num())
        self.after = self.step.shape[1] == 1
        dtype = job.dtype if exact and self.after else torch.float32
        taken = min(16 // self.bits, 8 // dtype.itemsize)  # values at a time
        self.index = torch.int16 if taken * self.bits == 16 else torch.uint8
        codes = torch.arange(2 ** (taken * self.bits))
        found = torch.stack([values[(codes >> (i * self.bits)) & (2**self.bits - 1)] for i in range(taken)], -1).to(dtype)
        self.table, self.dtype = found.view(WORDS[taken * dtype.itemsize]).squeeze(-1), dtype
        self.packed = pack_bits(quantized.codes, self.bits)

    def __call__(self, x: Tensor) -> Tensor:
        some = max(1, PIECE // self.columns)
        inputs = x.to(self.dtype) if self.after else x
        y = torch.cat([self._product(inputs, first, first + some) for first in range(0, len(self.packed), some)], 1).to(x.dtype)
        return y.mul_(self.step.t().to(x.dtype)) if self.after else y

    def _product(self, x: Tensor, first: int, end: int) -> Tensor:
        """With these rows of the weight; without its scales, where they come after."""
        at = self.packed[first:end].view(self.index).int()
        if self.index is torch.int16:
            at &= 0xFFFF
        weight = self.table.index_select(0, at.reshape(-1)).view(self.dtype).view(len(at), -1)[:, : self.columns]
        if not self.after:
            step = self.step if len(self.step) == 1 else self.step[first:end]
            weight = weight.unflatten(1, (step.shape[1], -1)).mul_(step.unsqueeze(-1)).flatten(1).to(x.dtype)
        return functional.linear(x, weight)

    def codes(self) -> Tensor:
        return unpack_bits(self.packed, self.bits, self.columns)
