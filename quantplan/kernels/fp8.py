"""fp8: weights of one byte with a scale for each row or for the whole, multiplied as they are cast to the inputs' dtype, which
holds them exactly; the scales come afterwards. One pass over the weight instead of three.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from quantplan.kernel import KERNELS, Job, Kernel
from quantplan.scheme import Params
from quantplan.tensor import QuantizedTensor

FLOATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@KERNELS.register("fp8_cast")
class FP8Cast(Kernel):
    """Any inputs, in bfloat16 or float32."""

    rank: ClassVar[int] = 40

    @classmethod
    def refuse(cls, job: Job) -> str | None:
        if job.wq.name != "fp8":
            return f"weights are {job.wq.name}"
        if job.wq.strategy not in ("channel", "tensor"):
            return f"scales are for each {job.wq.strategy}, not for a whole row"
        if job.dtype not in (torch.bfloat16, torch.float32):
            return f"{str(job.dtype).removeprefix('torch.')} does not hold the products"
        return None

    def __init__(self, quantized: QuantizedTensor, job: Job, inputs: Params) -> None:
        self.weight = quantized.codes.view(FLOATS[getattr(job.wq, "format", "e4m3")])
        self.scale = job.wq.quantizer().step(dict(quantized.params)).float().reshape(-1).expand(job.rows).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        return (functional.linear(x, self.weight.to(x.dtype)) * self.scale).to(x.dtype)

    def codes(self) -> Tensor:
        return self.weight.view(torch.uint8)
