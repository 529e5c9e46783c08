"""CONTRACT: an algorithm chooses the codes of one weight matrix on a scheme's grid. Members live in `algorithms/`.

A scheme is a grid, an algorithm is a way to choose points on it: every algorithm works with every scheme.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from quantplan.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from quantplan.scheme import Quantizer
    from quantplan.statistics import Statistics
    from quantplan.tensor import QuantizedTensor

Need = Literal["hessian", "drift"]  # what `Statistics` must hold


class BlockProblem(Protocol):
    """A block of the model whose matrices `Algorithm.solve` has put on their grids, to be tuned together."""

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Each matrix as it was, float32 `[rows, columns]`."""

    @property
    def started(self) -> Mapping[str, QuantizedTensor]:
        """Each matrix as it was solved."""

    @property
    def batches(self) -> int:
        """How many batches of data there are."""

    def loss(self, batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        """The error of the block's outputs, 0-d, when its matrices are `weights`, which may carry gradients."""


class Algorithm(BaseModel, ABC):
    """An algorithm with its options, which are its fields. Frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: ClassVar[str]
    passes: ClassVar[float] = 1.0  # rough cost, in roundings of the weight: for the time estimate
    tunes: ClassVar[bool] = False  # whether `tune` follows when all matrices of a block are solved
    implies: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # transforms that are half of the method, with their options

    @classmethod
    def plan_options(cls) -> dict[str, Any]:
        """Option name -> pydantic field."""
        return dict(cls.model_fields)

    @property
    def needs(self) -> frozenset[Need]:
        """The statistics it cannot do without; empty when it needs no data."""
        return frozenset()

    @property
    def takes_data(self) -> bool:
        """Whether it calibrates: to solve a matrix, or to tune it afterwards."""
        return bool(self.needs) or self.tunes

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

    def tune(self, problem: BlockProblem) -> Mapping[str, QuantizedTensor]:
        """Better choices for the matrices of a block, those it does not better left out. Only called where `tunes`."""
        raise NotImplementedError


ALGORITHMS: Registry[Algorithm] = Registry("algorithm", "algorithms")
