"""What calibration knows of the inputs of a matrix: second moments, and how far the quantized model's inputs have drifted."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quantplan.errors import fail

if TYPE_CHECKING:
    from torch import Tensor


HELD = 128 << 20  # bytes of statistics that were read, and of what was computed of them, that wait for the next matrix
LATEST = 2  # that stay whatever their size: q's, k's and v's, with o's between them in the file


@dataclass(frozen=True)
class Statistics:
    """Means over `count` tokens, float32 `[columns, columns]`.

    `hessian`: `E[x x^T]`, with `x` the inputs as the model quantized so far produces them. The squared error of a layer's
    outputs is `tr(E H E^T)` for an error `E` of its weight, so it is (half) the Hessian of the layer's loss.
    `drift`: `E[(y - x) x^T]` with `y` the float model's inputs of the same tokens; None where it was not collected.

    What is computed of them is computed once, whatever threads ask for it.
    """

    hessian: Tensor
    count: int
    drift: Tensor | None = None
    _kept: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    _lock: Any = field(default_factory=threading.RLock, compare=False, repr=False)

    @property
    def nbytes(self) -> int:
        """What it holds now, with what was computed."""
        held = [self.hessian, self.drift, *tuple(self._kept.values())]
        return sum(x.nbytes for x in held if x is not None)

    def damped(self, damping: float) -> Tensor:
        """The Hessian with `damping` times its mean diagonal added to its diagonal, silent columns' too: inputs of another scale
        are to choose the same codes. The identity where it is zero. Computed once for matrices that share their inputs."""
        with self._lock:
            if ("damped", damping) not in self._kept:
                self._kept["damped", damping] = self._damped(damping)
            kept: Tensor = self._kept["damped", damping]
            return kept

    def _damped(self, damping: float) -> Tensor:
        import torch

        made = self.hessian.clone()
        diagonal = made.diagonal()
        mean = diagonal.mean()
        diagonal.add_(torch.where(mean == 0, 1.0, mean.mul(damping).clamp(min=torch.finfo(torch.float32).tiny)))
        return made

    def factor(self, damping: float, order: Tensor) -> Tensor:
        """Upper triangular `U` with `U^T U` the inverse of the damped Hessian, rows and columns in `order`; float32.

        The damping is doubled until the factorization exists, in float64 from the second try on. Raises QP604 when it never
        does."""

        key = ("factor", damping, tuple(order.tolist()))
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self._factor(damping, order)
            found: Tensor = self._kept[key]
            return found

    def _factor(self, damping: float, order: Tensor) -> Tensor:
        import torch

        added, dtype = damping, torch.float32
        for _ in range(12):
            upper = _inverse_factor(self.damped(added)[order[:, None], order].to(dtype))
            if upper is not None:
                return upper.float()
            added, dtype = (added if dtype == torch.float32 else 2 * max(added, 1e-4)), torch.float64
        raise fail("QP604", "the inputs' second moments cannot be factorized", "use more calibration data, or algorithm: rtn")

    def corrected(self, weight: Tensor, damping: float) -> Tensor:
        """The weight whose outputs for the quantized model's inputs come nearest to those of `weight` `[rows, columns]` for the
        float model's: `W + W D (H + damping)^-1` with `D` the drift (the closed form of Qronos, arXiv 2505.11695, and GPTAQ,
        2504.02692). The weight itself where there is no drift, or no factor of the Hessian."""
        import torch

        if self.drift is None:
            return weight
        with self._lock:
            if ("correction", damping) not in self._kept:
                damped = self._damped(damping)
                lower, failed = torch.linalg.cholesky_ex(damped)
                if failed:
                    lower, failed = torch.linalg.cholesky_ex(damped.double())
                self._kept["correction", damping] = None if failed else lower.float()
            lower = self._kept["correction", damping]
        return weight if lower is None else weight + torch.cholesky_solve((weight @ self.drift).t(), lower).t()


def _inverse_factor(matrix: Tensor) -> Tensor | None:
    """Upper triangular `U` with `U^T U` the inverse of `matrix`, which is given up; None when rounding errors forbid it. No more
    than two such matrices are held at a time beside what the caller holds."""
    import torch

    matrix, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        return None
    matrix = torch.cholesky_inverse(matrix)
    matrix, failed = torch.linalg.cholesky_ex(matrix, upper=True)
    return matrix if not failed and torch.isfinite(matrix).all() else None
