"""CONTRACT: a kernel computes `y = x W^T` of a quantized linear from its codes, without the float matrix where it can. It says
what it does not serve, in words; it is made once for a layer and called for every batch. Members live in `kernels/`, one file
each; which one a layer gets is decided here and nowhere else: the first by `rank` that does not refuse.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantplan.registry import Registry
from quantplan.scheme import Params, SchemeConfig
from quantplan.tensor import QuantizedTensor

SETTING = "QUANTPLAN_KERNELS"  # names that may serve, with commas between them; `none` for the reference alone


@dataclass(frozen=True)
class Job:
    """A linear to be computed: weights `[rows, columns]` on the grid of `wq`, inputs on that of `aq` (None: as they are), which
    come in `dtype` on `device`."""

    wq: SchemeConfig
    aq: SchemeConfig | None
    rows: int
    columns: int
    device: torch.device
    dtype: torch.dtype


class Kernel(ABC):
    """The weight of one layer, laid out as an operation wants it."""

    name: ClassVar[str]
    rank: ClassVar[int]  # the lowest that serves is taken
    rounds: ClassVar[bool] = False  # it quantizes the inputs itself; else they come rounded, in their own dtype

    @classmethod
    @abstractmethod
    def refuse(cls, job: Job) -> str | None:
        """Why it does not serve this layer, here, as part of a sentence (`inputs are float32`); None when it does. Cheap."""

    @abstractmethod
    def __init__(self, quantized: QuantizedTensor, job: Job, inputs: Params) -> None:
        """`inputs`: what static activations were found to need. Not called for a job that is refused."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """`x` `[tokens, columns]` of the job's dtype -> `[tokens, rows]` of the same; no bias, no gradient. The result is within
        the dtype's rounding of `x W^T` with the dequantized weight; contiguous or not, with no tokens or many."""

    @property
    def holds_codes(self) -> bool:
        """Whether `codes` gives back the very codes it was made from, so that whoever made it need not keep them."""
        return True

    @abstractmethod
    def codes(self) -> Tensor:
        """The codes it was made from, uint8 `[rows, columns]`; not called unless it holds them."""


KERNELS: Registry[Kernel] = Registry("kernel", "kernels")


def ranked() -> list[type[Kernel]]:
    """All kernels, in the order they are asked."""
    return sorted(KERNELS, key=lambda kernel: (kernel.rank, kernel.name))


def serving(job: Job) -> type[Kernel] | None:
    """The kernel for a layer; None where the weight must be dequantized for each batch (the reference)."""
    return next((KERNELS.get(name) for name, refusal in refusals(job) if refusal is None), None)


def refusals(job: Job) -> Iterator[tuple[str, str | None]]:
    """Every kernel's name with why it does not serve the layer (None: it would), in the order they are asked. Raises QP107 for
    an unknown name in QUANTPLAN_KERNELS."""
    allowed = _allowed()
    for kernel in ranked():
        left_out = allowed is not None and kernel.name not in allowed
        refusal = "codes are wider than a byte" if job.wq.bits > 8 else kernel.refuse(job)
        yield kernel.name, f"{SETTING} leaves it out" if left_out else refusal


def _allowed() -> set[str] | None:
    """The kernels that QUANTPLAN_KERNELS names; None where it is not set."""
    setting = os.environ.get(SETTING)
    if setting is None:
        return None
    names = {name.strip() for name in setting.split(",")} - {"", "none"}
    return {KERNELS.get(name).name for name in names}
