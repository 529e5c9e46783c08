"""Products of many tokens: the dtype they are computed in, and second moments summed over batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quantplan.numerics import cpu_has_bfloat16

SLICE = 192  # columns of a second moment at a time: half of it is the mirror of the other half


class SecondMoment:
    """`E[x x^T]` over all `x` added, float32."""

    def __init__(self, columns: int) -> None:
        self._lower = torch.zeros(columns, columns)  # and, above the diagonal, parts of no use
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Rows of `x` `[tokens, columns]`, summed in float32: sums in bfloat16 are not positive definite where columns differ by
        orders of magnitude."""
        with _exact_for(x):
            x = x.float()
            for start in range(0, x.shape[1], SLICE):
                self._lower[start:, start : start + SLICE].addmm_(x[:, start:].t(), x[:, start : start + SLICE])
        self.count += len(x)

    def mean(self) -> Tensor:
        """The mean `[columns, columns]`, zero when nothing was added; this object is used up."""
        lower = self._lower.tril_()
        return lower.add_(lower.tril(-1).t()).div_(max(1, self.count))


@contextlib.contextmanager
def _exact_for(x: Tensor) -> Iterator[None]:
    """While it is open, float32 products round their inputs to bfloat16, which is faster, if that changes nothing in `x`."""
    if x.dtype != torch.bfloat16:
        yield
        return
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def fast_dtype() -> torch.dtype:
    """bfloat16 where this processor multiplies it faster than float32, else float32."""
    return torch.bfloat16 if cpu_has_bfloat16() else torch.float32


def computing() -> torch.autocast:
    """A context with products in the fast dtype and everything else in float32."""
    return torch.autocast("cpu", fast_dtype(), enabled=fast_dtype() != torch.float32)
