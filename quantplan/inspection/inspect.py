"""`inspect_checkpoint`: a checkpoint layer by layer, alone or against another, its weights and its activations."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantplan.errors import fail
from quantplan.evaluation.opened import local
from quantplan.inspection.layers import LayerInspection, inspect_layer
from quantplan.inspection.weights import CheckpointWeights, Stored

if TYPE_CHECKING:
    from quantplan.inspection.activations import ActivationInspection

Source = str | os.PathLike[str]
OnStep = Callable[[str, str, int, int], None]


@dataclass(frozen=True)
class Inspection:
    """What was seen of a checkpoint: its matrices in the order layers come in; with data, its activations. `unmatched`: its
    matrices that the other checkpoint lacks, or has in another shape."""

    checkpoint: str
    against: str | None
    layers: tuple[LayerInspection, ...]
    activations: tuple[ActivationInspection, ...] = ()
    unmatched: tuple[str, ...] = ()

    def worst(self) -> list[LayerInspection]:
        """The layers, worst first: NaN and infinity, then by error (the lowest signal-to-noise ratio), or without another
        checkpoint by outliers (the most standard deviations)."""
        return sorted(self.layers, key=_badness)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`: layers and activations worst first."""
        return {
            "checkpoint": self.checkpoint,
            "against": self.against,
            "layers": [layer.as_dict() for layer in self.worst()],
            "unmatched": list(self.unmatched),
            "activations": [a.as_dict() for a in sorted(self.activations, key=lambda a: a.badness)],
        }


def _badness(layer: LayerInspection) -> tuple[int, float, float]:
    """Sorts the worst to the front."""
    broken = -layer.values.nonfinite
    return (broken, 0 if layer.error is None else -1, -layer.values.sigmas if layer.error is None else layer.error.snr)


def inspect_checkpoint(
    checkpoint: Source,
    against: Source | None = None,
    data: Source | None = None,
    length: int = 256,
    windows: int = 4,
    on_step: OnStep | None = None,
) -> Inspection:
    """Ranges, scales, saturation and outliers of every matrix of `checkpoint` (a directory or a Hub id); with `against`,
    another checkpoint of the same model, the error of each against that; with `data`, a file as `evaluate` takes it, the
    activations of `windows` windows of `length` tokens too: their outliers, and their error against the other model's.

    Weights are read one matrix at a time; activations take both models in memory. `on_step(phase, name, done, total)` is called
    after each layer and each window. Raises QuantplanError: a checkpoint that cannot be read (QP2xx to QP4xx), one that is
    quantized and not by quantplan (QP220), one that shares no matrix with the other (QP221), data (QP105, QP130, QP131).
    """
    opened, reference = local(checkpoint), None if against is None else local(against)
    tell = on_step or (lambda phase, name, done, total: None)
    layers, unmatched = [], []
    with ExitStack() as stack:
        weights = stack.enter_context(CheckpointWeights(opened))
        other = None if reference is None else stack.enter_context(CheckpointWeights(reference))
        for done, (name, stored) in enumerate(weights.matrices.items(), 1):
            match = None if other is None else other.matrices.get(name)
            if other is not None and not _comparable(stored, match):
                unmatched.append(name)
                match = None
            if match is not None and match.rewritten != stored.rewritten:
                match = None  # one of them is of another basis: a difference would mean nothing
            layers.append(inspect_layer(weights, stored, other, match))
            tell("weights", name, done, len(weights.matrices))
    if other is not None and len(unmatched) == len(layers):
        text = f"shares no matrix with {reference.source if reference else ''}"
        raise fail("QP221", text, "compare two checkpoints of one model", file=opened.source)
    activations: tuple[ActivationInspection, ...] = ()
    if data is not None:
        from quantplan.inspection.activations import inspect_activations

        activations = inspect_activations(opened, reference, data, length, windows, tell)
    return Inspection(
        opened.source, None if reference is None else reference.source, tuple(layers), activations, tuple(unmatched)
    )


def _comparable(stored: Stored, match: Stored | None) -> bool:
    shape = (stored.matrix.rows, stored.matrix.columns)
    return match is not None and (match.matrix.rows, match.matrix.columns) == shape
