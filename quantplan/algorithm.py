"""CONTRACT: an algorithm chooses the codes of one weight matrix on a scheme's grid. Members live in `algorithms/`.

A scheme is a grid, an algorithm is a way to choose points on it: every algorithm works with every scheme.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from quantplan.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from quantplan.scheme import Quantizer
    from quantplan.statistics import Statistics
    from quantplan.tensor import QuantizedTensor

Need = Literal["hessian", "drift"]  # what `Statistics` must hold


class Algorithm(BaseModel, ABC):
    """An algorithm with its options, which are its fields. Frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: ClassVar[str]
    passes: ClassVar[float] = 1.0  # rough cost, in roundings of the weight: for the time estimate
    implies: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # transforms that are half of the method, with their options

    @classmethod
    def plan_options(cls) -> dict[str, Any]:
        """Option name -> pydantic field."""
        return dict(cls.model_fields)

    @property
    def needs(self) -> frozenset[Need]:
        """The statistics it cannot do without; empty when it needs no data."""
        return frozenset()

    @abstractmethod
    def solve(
        self,
        weight: Tensor,
        quantizer: Quantizer,
        absmax: Tensor | None = None,
        statistics: Statistics | None = None,
    ) -> QuantizedTensor:
        """`weight`, float32 `[rows, columns]`, on the quantizer's grid. Rows do not influence each other unless the scheme
        shares parameters between them. `absmax`: see `Quantizer.fit`; `statistics`: of the inputs, with all that `needs` says.
        Raises NonFinite."""


ALGORITHMS: Registry[Algorithm] = Registry("algorithm", "algorithms")
