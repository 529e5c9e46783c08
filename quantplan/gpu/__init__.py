"""Work on NVIDIA GPUs, in Triton: products with packed weights, rounding to grids, packing. Files other than this one import
triton, so they are imported where they are used; `refuse` says first whether they can be.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

OLDEST = (8, 0)  # compute capability from which bfloat16 is multiplied


def refuse(device: torch.device) -> str | None:
    """Why Triton's kernels do not run on a device, as part of a sentence; None when they do. They run on the cpu in Triton's
    interpreter alone (TRITON_INTERPRET=1, set before anything imports triton), which is thousands of times slower: for tests."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"it runs on cuda, not on {device.type}"
    if not _installed():
        return "the package triton is not installed (pip install quantplan[gpu])"
    if device.type == "cuda" and not interpreted() and _capability(device) < OLDEST:
        return f"the GPU's compute capability is {'.'.join(map(str, _capability(device)))}, below 8.0"
    return None


def interpreted() -> bool:
    """Whether Triton was told to interpret its kernels on the cpu."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    import torch

    return torch.cuda.get_device_capability(device)
