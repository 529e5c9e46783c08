"""How long calls take: runs after a warm-up, and their median and spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Milliseconds: the median, and what a tenth of the calls stays below and above."""

    median_ms: float
    p10_ms: float
    p90_ms: float


def spread(seconds: Sequence[float]) -> Spread:
    """The spread of at least one duration, in seconds. Percentiles lie between neighbours, linearly (Hyndman and Fan, 1996,
    type 7): of few calls they are little more than the shortest and the longest."""
    ordered = sorted(seconds)

    def percentile(share: float) -> float:
        at = share * (len(ordered) - 1)
        low = int(at)
        high = min(low + 1, len(ordered) - 1)
        return 1000 * (ordered[low] + (at - low) * (ordered[high] - ordered[low]))

    return Spread(percentile(0.5), percentile(0.1), percentile(0.9))


def timed(call: Callable[[], object], synchronize: Callable[[], object] | None = None) -> float:
    """Seconds that one call takes. `synchronize` waits for a device that computes by itself, before and after."""
    if synchronize:
        synchronize()
    started = time.perf_counter()
    call()
    if synchronize:
        synchronize()
    return time.perf_counter() - started


def waits_for(device: str) -> Callable[[], object] | None:
    """What waits until `device` is done; None for the CPU, which computes at once."""
    import torch

    if not device.startswith("cuda"):
        return None
    return lambda: torch.cuda.synchronize(device)
