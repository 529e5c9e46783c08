"""The machine a run was made on."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path


def machine() -> Iterator[tuple[str, str]]:
    """What a reader needs to judge times by: processor, cores, memory, system."""
    import psutil

    from quantplan.estimate import cores

    yield "processor", _processor()
    yield "cores", f"{psutil.cpu_count() or 1}, {cores()} used"
    yield "memory", f"{psutil.virtual_memory().total / 1e9:.1f} GB"
    yield "system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"


def _processor() -> str:
    """The processor's name, as the system knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()
