"""Where the bytes of an output went: by treatment, from the source's size to its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantplan.checkpoint.layout import output_layout
from quantplan.explain import summary
from quantplan.plan.resolve import Resolution


@dataclass(frozen=True)
class TreatmentSize:
    """All modules that are treated alike: bytes in the source and in the output; `quantized`: whether they were."""

    treatment: str
    modules: int
    weights: int
    before: int
    after: int
    quantized: bool

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return 8 * self.after / max(1, self.weights)


def treatment_sizes(resolution: Resolution) -> Sequence[TreatmentSize]:
    """Bytes by treatment, those that save most first. Tensors that belong to no module (biases) are `other tensors`."""
    owners = {a.module.tensor.name: a for a in resolution.assignments.values()}
    found: dict[str, list[int]] = {}
    quantized: dict[str, bool] = {}
    seen: set[str] = set()
    for file in output_layout(resolution).files:
        for unit in file.units:
            owner = owners.get(unit.source.name)
            name = "other tensors" if owner is None else summary(owner)
            quantized[name] = owner is not None and owner.wq is not None
            entry = found.setdefault(name, [0, 0, 0, 0])
            entry[3] += unit.size
            if unit.source.name not in seen:  # several matrices may come from one tensor
                seen.add(unit.source.name)
                elements = 1
                for n in unit.source.shape:
                    elements *= n
                for i, more in enumerate((1, elements, unit.source.size)):
                    entry[i] += more
    made = [
        TreatmentSize(name, modules, weights, before, after, quantized[name])
        for name, (modules, weights, before, after) in found.items()
    ]
    return sorted(made, key=lambda t: t.after - t.before)
