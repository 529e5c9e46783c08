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
        rows = self.step.shape[1] == 1
        dtype = job.dtype if exact and rows else torch.float32
        taken = min(16 // self.bits, 8 // dtype.itemsize)  # values at a time
        self.index = torch.int16 if taken * self.bits == 16 else torch.uint8
        codes = torch.arange(2 ** (taken * self.bits))
        found = torch.stack([values[(codes >> (i * self.bits)) & (2**self.bits - 1)] for i in range(taken)], -1).to(dtype)
        self.table, self.dtype = found.view(WORDS[taken * dtype.itemsize]).squeeze(-1), dtype
        self.packed = pack_bits(quantized.codes, self.bits)

    def __call__(self, x: Tensor) -> Tensor:
        at = self.packed.view(self.index).int()
        if self.index is torch.int16:
            at &= 0xFFFF
        weight = self.table.index_select(0, at.reshape(-1)).view(self.dtype).view(len(self.packed), -1)[:, : self.columns]
        if self.step.shape[1] == 1:
            return functional.linear(x.to(self.dtype), weight).to(x.dtype).mul_(self.step.t().to(x.dtype))
        groups = weight.unflatten(1, (self.step.shape[1], -1)).mul_(self.step.unsqueeze(-1))
        return functional.linear(x, groups.flatten(1).to(x.dtype))

    def codes(self) -> Tensor:
        return unpack_bits(self.packed, self.bits, self.columns)
