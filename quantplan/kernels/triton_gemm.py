"""Weights of any scheme, packed, on NVIDIA GPUs: read as many bits as they have, dequantized on the way to the product."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from quantplan import gpu
from quantplan.kernel import KERNELS, Job, Kernel
from quantplan.scheme import Params
from quantplan.tensor import QuantizedTensor


@KERNELS.register("triton")
class Triton(Kernel):
    """Any inputs, in bfloat16, float16 or float32."""

    rank: ClassVar[int] = 35

    @classmethod
    def refuse(cls, job: Job) -> str | None:
        if refused := gpu.refuse(job.device):
            return refused
        if job.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"inputs are {str(job.dtype).removeprefix('torch.')}"
        if not job.wq.symmetric_grid and not job.wq.name.startswith("int"):
            return f"{job.wq.name} with a zero point moves levels that are not evenly spaced"
        return None

    def __init__(self, quantized: QuantizedTensor, job: Job, inputs: Params) -> None:
        from quantplan.gpu.matmul import pack

        self.weight = pack(quantized)

    def __call__(self, x: Tensor) -> Tensor:
        from quantplan.gpu.matmul import matmul

        return matmul(x, self.weight)

    def codes(self) -> Tensor:
        return self.weight.codes()
