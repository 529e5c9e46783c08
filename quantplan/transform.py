"""CONTRACT: a transform rewrites a model before it is quantized, so that the same function is easier to round. Members live in
`transforms/`, one file each.

A transform never sees a model. It is shown an edge (channels that one parameter scales and matrices read) and answers with
factors, or a residual stream and answers with changes of stored tensors, or a solved matrix and answers with what its bias
should gain. Which of the three it does is all that tells transforms apart; finding edges and streams, and writing back what
changed, is the engine's.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from quantplan.assignment import Assignment
from quantplan.errors import Problem
from quantplan.headers import Checkpoint
from quantplan.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from quantplan.scheme import Quantizer

Kind = Literal["norm", "linear"]  # what scales the channels of an edge
Change = Callable[["Tensor"], "Tensor"]  # a stored tensor in float64 -> what stands in its place, of the same shape


@dataclass(frozen=True, eq=False)
class Inputs:
    """What is known of the inputs `x` of a matrix: over all tokens `max |x|` and `mean |x|`, `[features]`; `E[x x^T]`,
    `[features, features]`, where a transform asked for it. Float32."""

    absmax: Tensor
    magnitude: Tensor
    hessian: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Reader:
    """A matrix that reads channels. `weight`: float32 `[rows, features]`. `columns[j]`: the channel that feature j is, -1 for
    none; several features may be one channel (heads that share values). `quantizer`: None when the matrix is kept."""

    weight: Tensor
    columns: Tensor
    inputs: Inputs
    quantizer: Quantizer | None

    def largest(self, values: Tensor, channels: int) -> Tensor:
        """`[channels]`: for each channel the largest of `values` `[features]`, at least 0; 0 where no feature is that channel."""
        import torch

        read = self.columns >= 0
        return torch.zeros(channels).scatter_reduce_(0, self.columns[read], values[read].float(), "amax")

    def spread(self, factors: Tensor) -> Tensor:
        """`[features]`: the factor of each feature's channel, 1 for features that are none."""
        import torch

        return torch.where(self.columns >= 0, factors[self.columns.clamp_min(0)], 1.0)


@dataclass(frozen=True, eq=False)
class Channels:
    """An edge of a block: `count` channels scaled by a norm's gain or the rows of a matrix, and the matrices that read them."""

    kind: Kind
    count: int
    readers: tuple[Reader, ...]


@dataclass(frozen=True, eq=False)
class Site:
    """A stored tensor where it meets the residual stream, along `axis`. `gain`: of the norm between the two, float64
    `[width]`, for tensors that read the stream behind it; None for those that write to it or are looked up."""

    tensor: str
    axis: int
    gain: Tensor | None = None


@dataclass(frozen=True, eq=False)
class NormSite:
    """A norm that reads the residual stream. `gain`, `bias` ('' for none): its tensors. `values`: of the gain, float64, with
    `offset`, what the norm's code adds to it. `centred`: the norm takes the mean away."""

    gain: str
    bias: str
    values: Tensor
    offset: float
    centred: bool


@dataclass(frozen=True, eq=False)
class HeadSite:
    """A stored tensor that writes or reads the values of attention heads along `axis`: `order` `[heads, size]` are the places
    of each head's values."""

    tensor: str
    axis: int
    order: Tensor


@dataclass(frozen=True, eq=False)
class Residual:
    """The residual stream of a model: how wide it is, and every stored tensor that meets it. `embedding`: a tensor that is
    looked up into it, `[.., width]`."""

    width: int
    embedding: str
    sites: tuple[Site, ...]
    norms: tuple[NormSite, ...]
    heads: tuple[HeadSite, ...] = ()


class Transform(BaseModel, ABC):
    """A transform with its options, which are its fields. Frozen. A member overrides one of `factors`, `rewrite` and `bias`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: ClassVar[str]
    scales: ClassVar[frozenset[Kind]] = frozenset()  # it scales the channels of these edges: `factors`
    rewrites: ClassVar[bool] = False  # it rewrites stored tensors, and needs no data: `rewrite`
    corrects: ClassVar[bool] = False  # it corrects biases for what quantizing did, which is no equivalence: `bias`
    needs_hessian: ClassVar[bool] = False  # `Inputs.hessian` is asked for

    @classmethod
    def plan_options(cls) -> dict[str, Any]:
        """Option name -> pydantic field."""
        return dict(cls.model_fields)

    @property
    def needs_data(self) -> bool:
        """Whether it must see activations."""
        return not self.rewrites

    @property
    def kinds(self) -> frozenset[Kind]:
        """The edges it scales with these options."""
        return self.scales

    def wants(self, assignment: Assignment) -> bool:
        """Whether it is there for this module: an edge is scaled when one of its matrices is wanted."""
        return assignment.wq is not None

    def stored(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint with the tensors that the transform needs: itself, unless tensors that share bytes must part."""
        return checkpoint

    def check(self, checkpoint: Checkpoint, assignments: Mapping[str, Assignment]) -> Iterator[Problem]:
        """What keeps it from working, as far as headers tell."""
        if not any(self.wants(a) for a in assignments.values()):
            yield Problem("QP122", f"transform '{self.name}' has nothing to do: no module it is for", "remove it")

    def factors(self, channels: Channels) -> Tensor | None:
        """What the source of each channel is multiplied with, and the columns that read it divided by: positive, `[count]`;
        None to leave the edge as it is."""
        raise NotImplementedError

    def rewrite(self, residual: Residual) -> Mapping[str, Change]:
        """Stored tensor -> its change."""
        raise NotImplementedError

    def bias(self, weight: Tensor, quantized: Tensor, mean: Tensor) -> Tensor:
        """What a bias gains, `[rows]`, when `weight` `[rows, features]` became `quantized`, and inputs are `mean` `[features]`
        on average."""
        raise NotImplementedError


TRANSFORMS: Registry[Transform] = Registry("transform", "transforms")
