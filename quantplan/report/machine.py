"""The machine a run was made on."""

from __future__ import annotations

import platform
from collections.abc import Iterator

from quantplan.comparison.machine import processor


def machine() -> Iterator[tuple[str, str]]:
    """What a reader needs to judge times by: processor, cores, memory, system."""
    import psutil

    from quantplan.estimate import cores

    yield "processor", processor()
    yield "cores", f"{psutil.cpu_count() or 1}, {cores()} used"
    yield "memory", f"{psutil.virtual_memory().total / 1e9:.1f} GB"
    yield "system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
