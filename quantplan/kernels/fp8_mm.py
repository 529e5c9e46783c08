"""fp8 times fp8 on the matrix units of GPUs that have them, with what the scales are for done afterwards in float32. Sums there
are kept with fewer bits than float32 has: torch's slower, more exact kind is asked for.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from quantplan.kernel import KERNELS, Job, Kernel
from quantplan.scheme import Params, SchemeConfig
from quantplan.tensor import QuantizedTensor

FLOATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
OLDEST = (8, 9)  # compute capability that multiplies fp8
MULTIPLE = 16  # what rows and columns must be


@KERNELS.register("fp8_mm")
class FP8MM(Kernel):
    """Weights and inputs in fp8, inputs dynamic or static, one range for a token or for all. Right on the cpu too, and slow: the
    tests call it there."""

    rank: ClassVar[int] = 15
    rounds: ClassVar[bool] = True

    @classmethod
    def refuse(cls, job: Job) -> str | None:
        if job.device.type != "cuda":
            return f"it runs on cuda, not on {job.device.type}"
        capability = torch.cuda.get_device_capability(job.device)
        if capability < OLDEST:
            return f"the GPU's compute capability is {'.'.join(map(str, capability))}, below 8.9"
        return misfit(job)

    def __init__(self, quantized: QuantizedTensor, job: Job, inputs: Params) -> None:
        assert job.aq is not None
        self.weight = quantized.codes.view(_dtype(job.wq))
        self.scale = job.wq.quantizer().step(dict(quantized.params)).float().reshape(-1).expand(job.rows).contiguous()
        self.one = torch.ones((), device=quantized.codes.device)
        self.aq, self.inputs, self.quantizer = job.aq, dict(inputs), job.aq.quantizer()
        self.dtype = _dtype(job.aq)

    def __call__(self, x: Tensor) -> Tensor:
        if not len(x):
            return x.new_empty(0, len(self.weight))
        wide = x.float()
        params = self.quantizer.fit(self.quantizer.groups(wide)) if self.aq.dynamic else self.inputs
        scale = self.quantizer.step(params).reshape(-1, 1)  # one for each token, or one
        most = torch.finfo(self.dtype).max
        codes = (wide / scale).clamp_(-most, most).to(self.dtype)  # as numerics.encode_float, in one step
        y = torch._scaled_mm(codes, self.weight.t(), self.one, self.one, out_dtype=torch.float32)
        return (y * scale * self.scale).to(x.dtype)

    def codes(self) -> Tensor:
        return self.weight.view(torch.uint8)


def misfit(job: Job) -> str | None:
    """Why the operation cannot compute a layer, wherever it runs."""
    if job.wq.name != "fp8":
        return f"weights are {job.wq.name}"
    if job.wq.strategy not in ("channel", "tensor"):
        return f"scales are for each {job.wq.strategy}, not for a whole row"
    if job.aq is None:
        return "inputs are not quantized"
    if job.aq.name != "fp8":
        return f"inputs are {job.aq.name}"
    if job.aq.strategy not in ("token", "channel", "tensor"):
        return f"inputs have scales for each {job.aq.strategy}"
    if job.aq.rounding != "nearest":
        return "inputs are rounded stochastically"
    if _dtype(job.wq) is _dtype(job.aq) is torch.float8_e5m2:
        return "weights and inputs are both e5m2"
    if job.rows % MULTIPLE or job.columns % MULTIPLE:
        return f"{job.rows} x {job.columns} is no multiple of {MULTIPLE} both ways"
    return None


def _dtype(scheme: SchemeConfig) -> torch.dtype:
    return FLOATS[getattr(scheme, "format", "e4m3")]
