"""How far a run is, and the memory it took."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from quantplan.engine.calibrated import SolvedBlock


@dataclass(frozen=True)
class Step:
    """Progress. `reading`: calibration data are made, in tokens; `calibrating`: a block is solved; `quantizing`: a unit is
    written, in bytes of the source; `training`: a step of it is done, in thousandths of the budget."""

    phase: Literal["reading", "calibrating", "quantizing", "training"]
    name: str
    done: int
    total: int
    block: SolvedBlock | None = None
    metrics: Mapping[str, Any] | None = None

    def as_event(self) -> dict[str, Any]:
        """Plain data, for a log."""
        event: dict[str, Any] = {"phase": self.phase, "name": self.name, "done": self.done, "total": self.total}
        event |= {} if self.metrics is None else {"metrics": dict(self.metrics)}
        return event if self.block is None else {**event, **self.block.as_event(), "memory_bytes": peak_memory()}


OnStep = Callable[[Step], None]


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes; on Linux without that of the process that started it, which
    `getrusage` counts in."""
    import resource

    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
