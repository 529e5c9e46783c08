"""smoothquant: outliers of activations moved into the weights that read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from quantplan.assignment import Assignment
from quantplan.errors import Problem
from quantplan.headers import Checkpoint
from quantplan.transform import TRANSFORMS, Channels, Kind, Transform

if TYPE_CHECKING:
    from torch import Tensor

LEAST = 1e-5  # of a channel's factor, either way: a channel that is silent in the data may speak later


@TRANSFORMS.register("smoothquant")
class SmoothQuant(Transform):
    """Scales channels by `max|x|^alpha / max|w|^(1-alpha)` (Xiao et al. 2023, arXiv 2211.10438), so that activations are as
    easy to round as weights. For activations in int8 or fp8; folded into norms, so nothing is left to compute."""

    scales: ClassVar[frozenset[Kind]] = frozenset({"norm", "linear"})

    alpha: float = Field(default=0.5, ge=0, le=1)
    """how much of the difficulty goes to the weights: 0.5 halves it, 0.75 to 0.9 suit models with strong outliers"""
    linear: bool = False
    """true: also between matrices (values and output projection, up and down projection), not only behind norms"""
    everywhere: bool = False
    """true: also where activations are not quantized"""

    @property
    def kinds(self) -> frozenset[Kind]:
        return self.scales if self.linear else frozenset({"norm"})

    def wants(self, assignment: Assignment) -> bool:
        return assignment.wq is not None and (self.everywhere or assignment.aq is not None)

    def check(self, checkpoint: Checkpoint, assignments: Mapping[str, Assignment]) -> Iterator[Problem]:
        if not any(self.wants(a) for a in assignments.values()):
            advice = "set aq, or everywhere: true to smooth for the weights' sake"
            yield Problem("QP122", "transform 'smoothquant' has nothing to do: no activations are quantized", advice)

    def factors(self, channels: Channels) -> Tensor | None:
        import torch

        given, weights = torch.zeros(channels.count), torch.zeros(channels.count)
        for reader in channels.readers:
            given = torch.maximum(given, reader.largest(reader.inputs.absmax, channels.count))
            weights = torch.maximum(weights, reader.largest(reader.weight.abs().amax(0), channels.count))
        scale = given.pow(self.alpha) / weights.pow(1 - self.alpha)
        scale = torch.where((given > 0) & (weights > 0), scale.clamp(LEAST, 1 / LEAST), 1.0)
        return scale.reciprocal()
