"""int8: weights as signed bytes with a scale for each row. `int8pack` is torch's weight-only operation for CPUs; `int8_mm`
multiplies integers by integers, exactly, with what the scales are for done afterwards (Jacob et al. 2018, arXiv 1712.05877, 2.4).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from quantplan.kernel import KERNELS, Job, Kernel
from quantplan.numerics import cpu_has_bfloat16, round_through
from quantplan.scheme import Params, SchemeConfig
from quantplan.tensor import QuantizedTensor

DENSE = 64  # tokens from which on a float product is faster than int8pack
MIDDLE = 128


class _SignedRows(Kernel):
    """A symmetric integer matrix, `scale[row] * weight[row, column]`."""

    def __init__(self, quantized: QuantizedTensor, job: Job, inputs: Params) -> None:
        self.middle = 2 ** (job.wq.bits - 1)
        self.weight = (quantized.codes - self.middle).view(torch.int8)
        self.scale = job.wq.quantizer().step(dict(quantized.params)).float().reshape(-1).expand(job.rows)

    @classmethod
    def refuse(cls, job: Job) -> str | None:
        if job.wq.strategy not in ("channel", "tensor"):
            return f"scales are for each {job.wq.strategy}, not for a whole row"
        if not _is_integer(job.wq) or not job.wq.symmetric_grid:
            return f"{_shown(job.wq)} weights are no symmetric integers"
        return None

    def codes(self) -> Tensor:
        return self.weight.view(torch.uint8) + self.middle


@KERNELS.register("int8pack")
class Int8Pack(_SignedRows):
    """Inputs as they are; others than bfloat16 are multiplied in float32, by the cast weight."""

    rank: ClassVar[int] = 20

    @classmethod
    def refuse(cls, job: Job) -> str | None:
        if job.device.type != "cpu":
            return f"it runs on the cpu, not on {job.device.type}"
        if job.wq.bits <= 4:
            return f"{job.wq.name} takes a byte here, and half of one in int4pack"
        return super().refuse(job)

    def __init__(self, quantized: QuantizedTensor, job: Job, inputs: Params) -> None:
        super().__init__(quantized, job, inputs)
        self.scale = self.scale.to(job.dtype).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype is torch.bfloat16 and x.shape[0] < DENSE:  # in other dtypes the operation is slow
            return torch._weight_int8pack_mm(x.contiguous(), self.weight, self.scale)
        product = torch.bfloat16 if x.dtype is torch.bfloat16 and cpu_has_bfloat16() else torch.float32
        return functional.linear(x.to(product), self.weight.to(product)).mul_(self.scale).to(x.dtype)


@KERNELS.register("int8_mm")
class Int8MM(_SignedRows):
    """Inputs as integers too, dynamic or static, one range for a token or for all."""

    rank: ClassVar[int] = 10
    rounds: ClassVar[bool] = True

    @classmethod
    def refuse(cls, job: Job) -> str | None:
        if job.device.type not in ("cpu", "cuda"):
            return f"it runs on cpu and cuda, not on {job.device.type}"
        if job.device.type == "cuda" and (job.rows % 8 or job.columns % 8):
            return f"{job.rows} x {job.columns} is no multiple of 8 both ways"
        if job.aq is None:
            return "inputs are not quantized"
        if not _is_integer(job.aq):
            return f"{_shown(job.aq)} inputs are no integers"
        if job.aq.strategy not in ("token", "channel", "tensor"):
            return f"inputs have scales for each {job.aq.strategy}"
        return super().refuse(job)

    def __init__(self, quantized: QuantizedTensor, job: Job, inputs: Params) -> None:
        super().__init__(quantized, job, inputs)
        assert job.aq is not None
        self.aq, self.inputs = job.aq, dict(inputs)
        self.quantizer = job.aq.quantizer()
        # as `quantize` would, in a third of its steps: with few tokens these take longer than the product
        self.plain = job.aq.symmetric_grid and job.aq.rounding == "nearest" and getattr(job.aq, "quotient_dtype", "") == "float32"
        self.half, self.axes = 2 ** (job.aq.bits - 1), (0, 1) if job.aq.strategy == "tensor" else (-1,)
        self.share = 1 / getattr(job.aq, "divisor", 1.0)  # of integers, for which `plain` is set
        self.stored: torch.dtype = getattr(torch, getattr(job.aq, "scale_dtype", None) or "bfloat16")
        self.scale = self.scale.contiguous()
        # static ranges have one step, known before the inputs are
        self.known = None if job.aq.dynamic else self.quantizer.step(self.inputs)
        self.outputs = self.scale if self.known is None else self.known * self.scale
        self.transposed = self.weight.t()
        # codes of 8 bits that stand for code - zero point are multiplied as code - 128: a sum of the row makes up for it
        self.sums = self.weight.sum(1, dtype=torch.int32)

    def __call__(self, x: Tensor) -> Tensor:
        if not len(x):
            return x.new_empty(0, len(self.weight))
        step = self.known
        if self.plain:
            step = self._step(x) if step is None else step
            y = _int_mm((x / step).round_().clamp_(-self.half, self.half - 1).to(torch.int8), self.transposed)
        else:
            q = self.quantizer.quantize(x) if self.aq.dynamic else None
            params = self.inputs if q is None else dict(q.params)
            codes = self.quantizer.encode(x.float(), params) if q is None else q.codes
            step = self.quantizer.step(params)
            y = _int_mm((codes - MIDDLE).view(torch.int8), self.transposed)
            zero = params["zero_point"].int() if "zero_point" in params else self.half
            y += self.sums * (MIDDLE - zero)
        if self.known is not None:
            return (y * self.outputs).to(x.dtype)
        return y.float().mul_(step).mul_(self.outputs).to(x.dtype)

    def _step(self, x: Tensor) -> Tensor:
        """The step of every token `[tokens, 1]`, or of all, float32. Zero tokens get the smallest, and codes of zero."""
        return round_through(x.abs().amax(self.axes, keepdim=True).float().mul_(self.share), self.stored).float()


def _int_mm(x: Tensor, transposed: Tensor) -> Tensor:
    """`x transposed`, int32; cuda's operation takes 17 rows or more."""
    missing = 17 - len(x) if x.is_cuda else 0
    if missing > 0:
        return torch._int_mm(functional.pad(x, (0, 0, 0, missing)), transposed)[: len(x)]
    return torch._int_mm(x, transposed)


def _is_integer(scheme: SchemeConfig) -> bool:
    return scheme.lopsided or not scheme.symmetric_grid  # no float reaches further to one side, or has a zero point


def _shown(scheme: SchemeConfig) -> str:
    return f"{'' if scheme.symmetric_grid else 'asymmetric '}{scheme.name}"
