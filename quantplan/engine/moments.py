"""Products of many tokens: the dtype they are computed in, and second moments summed over batches."""

from __future__ import annotations

import torch
from torch import Tensor

SLICE = 192  # columns of a second moment at a time: half of it is the mirror of the other half


class SecondMoment:
    """`E[x x^T]` over all `x` added, float32."""

    def __init__(self, columns: int) -> None:
        self._lower = torch.zeros(columns, columns)  # and, above the diagonal, parts of no use
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Rows of `x`, float32 `[tokens, columns]`. In float32: sums in bfloat16 are not positive definite where columns differ
        by orders of magnitude."""
        for start in range(0, x.shape[1], SLICE):
            self._lower[start:, start : start + SLICE].addmm_(x[:, start:].t(), x[:, start : start + SLICE])
        self.count += len(x)

    def mean(self) -> Tensor:
        """The mean `[columns, columns]`, zero when nothing was added; this object is used up."""
        lower = self._lower.tril_()
        return lower.add_(lower.tril(-1).t()).div_(max(1, self.count))


def fast_dtype() -> torch.dtype:
    """bfloat16 where this processor multiplies it faster than float32, else float32."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def computing() -> torch.autocast:
    """A context with products in the fast dtype and everything else in float32."""
    return torch.autocast("cpu", fast_dtype(), enabled=fast_dtype() != torch.float32)
