"""An assignment: one module with everything decided, and which line of the plan said so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quantplan.algorithm import Algorithm
from quantplan.errors import Path
from quantplan.models.modules import Matrix, Module
from quantplan.observer import ObserverConfig
from quantplan.scheme import SchemeConfig


@dataclass(frozen=True)
class Origin:
    """Where a value comes from: a path into the plan, or (with no path) what `label` says."""

    path: Path | None = None
    label: str = ""


@dataclass(frozen=True)
class Assignment:
    """A module and its treatment. `wq` None: the weight stays in the source precision. Fields of `origin` are named as in a
    plan: `wq.scheme`, `wq.group_size`, `aq.scheme`, `algorithm.name`, … `observer`: what finds the range of static
    activations; None where `aq` is dynamic."""

    module: Module
    wq: SchemeConfig | None
    aq: SchemeConfig | None
    algorithm: Algorithm
    origin: Mapping[str, Origin]
    observer: ObserverConfig | None = None

    @property
    def name(self) -> str:
        return self.module.name

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """What is quantized; empty when the module is kept."""
        return self.module.matrices if self.wq is not None else ()
