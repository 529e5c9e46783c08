"""95 % confidence intervals from standard errors over windows."""

from __future__ import annotations

import math
from functools import cache

CONFIDENCE = 0.95
LARGE = 10_000  # degrees of freedom: with more, the value changes by less than 0.01 %


def margin(error: float | None, windows: int) -> float | None:
    """Half the width of the 95 % confidence interval of a mean over `windows` windows with this standard error; None without
    one. Windows are taken as independent and their values as normal (Student, 1908): of few it is wide, and rough."""
    return None if error is None or windows < 2 else student_t(windows - 1) * error


@cache
def student_t(freedom: int) -> float:
    """What the magnitude of Student's t with `freedom` degrees of freedom stays below with probability 0.95."""
    freedom = min(freedom, LARGE)
    low, high = 0.0, math.pi / 2  # of the angle atan(t / sqrt(freedom)), which the probability grows with
    while high - low > 1e-15:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < CONFIDENCE else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _within(angle: float, freedom: int) -> float:
    """Probability that |t| < tan(angle) sqrt(freedom). Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    odd, cosine = freedom % 2, math.cos(angle)
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
