"""CONTRACT: an observer turns a stream of tensors into a range. Its config is torch-free and holds the options and three
functions: the statistics of one tensor, the statistics of two streams joined, the range they give. Statistics are a few
tensors by name, never changed once made; `Observer` keeps the latest. Members live in `observers/`, one file each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

from quantplan.errors import fail
from quantplan.registry import Registry
from quantplan.scheme import check_finite

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor

    from quantplan.scheme import Quantizer

Statistics = dict[str, "Tensor"]


@dataclass(frozen=True)
class Range:
    """Where the values of a tensor lie, or of each channel.

    Invariants: `low` and `high` are finite, float32, of one shape: 0-d, or `[channels]`; `low <= high`. Zero need not lie
    between them.
    """

    low: Tensor
    high: Tensor

    @property
    def absmax(self) -> Tensor:
        """The largest magnitude, shape of `low`."""
        import torch

        return torch.maximum(self.low.abs(), self.high.abs())

    def to(self, device: torch.device | str) -> Range:
        """The same range on a device."""
        return Range(self.low.to(device), self.high.to(device))


class ObserverConfig(BaseModel, ABC):
    """The options of an observer, which are its fields, and its arithmetic. Frozen.

    Joining is associative, and a stream's statistics are those of its tensors joined in order, so that one run and
    several partial ones agree.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: ClassVar[str]
    use: ClassVar[str]  # what it is for, in a few words
    dynamic: ClassVar[bool] = False  # collects nothing: ranges are taken from each tensor as it comes
    within: ClassVar[bool] = True  # the range ends where values were seen, or before
    # whether another order of the same tensors gives another range; if not, `join` is exact and commutes
    order_matters: ClassVar[bool] = False
    collects: ClassVar[str] = ""  # what its statistics are called where they are stored; by default its own name
    ranging: ClassVar[frozenset[str]] = frozenset()  # options that `range` alone looks at

    @classmethod
    def options(cls) -> dict[str, Any]:
        """Option name -> pydantic field."""
        return dict(cls.model_fields)

    @property
    def statistics_name(self) -> str:
        """What its statistics are called where they are stored."""
        return self.collects or self.name

    @property
    def collecting(self) -> dict[str, Any]:
        """The options that its statistics depend on: they serve every config of their name that has the same ones."""
        return self.model_dump(exclude=set(self.ranging))

    @property
    def channel_axis(self) -> int | None:
        """The axis whose every index has a range of its own; None when the tensor has one range."""
        return None

    def observer(self) -> Observer:
        """An observer that has seen nothing."""
        return Observer(self)

    @abstractmethod
    def collect(self, x: Tensor) -> Statistics:
        """The statistics of one tensor: not empty; float32, float16 or bfloat16; channels on the last axis where
        `channel_axis` is set. Raises NonFinite when `x` holds NaN or infinity."""

    @abstractmethod
    def join(self, first: Statistics, second: Statistics) -> Statistics:
        """The statistics of two streams, `second` coming after `first`."""

    def advance(self, seen: Statistics, x: Tensor) -> Statistics:
        """The statistics of a stream and one tensor more."""
        return self.join(seen, self.collect(x))

    @abstractmethod
    def range(self, seen: Statistics, quantizer: Quantizer | None) -> Range:
        """The range for the grid of `quantizer`, which only observers that weigh errors ask for; None: 8-bit integers."""


class CountingConfig(ObserverConfig):
    """An observer that counts values, each as the nearest bfloat16: 512 KB, whatever the stream."""

    collects: ClassVar[str] = "counts"

    def collect(self, x: Tensor) -> Statistics:
        from quantplan.numerics import count_bfloat16

        low, high = extremes(x)
        return {"low": low, "high": high, "counts": count_bfloat16(x)}

    def join(self, first: Statistics, second: Statistics) -> Statistics:
        return {**hull(first, second), "counts": first["counts"] + second["counts"]}


class Observer:
    """A config and the statistics seen so far. Members of `observers/` do not subclass it: see `ObserverConfig`."""

    def __init__(self, config: ObserverConfig) -> None:
        self.config = config
        self._seen: Statistics | None = None

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Takes in a tensor of any shape and float dtype, whose last axis is features. `mask`, bool over the leading axes,
        says which tokens count. A tensor without elements, or of which no token counts, changes nothing.

        Raises NonFinite when a value that counts is NaN or infinite, QuantplanError QP105 for a mask or a channel axis that
        does not fit; then nothing has changed.
        """
        import torch

        x = x.detach()
        x = x.reshape(1) if x.dim() == 0 else x
        if self.config.channel_axis is not None:
            x = self._channels_last(x, self.config.channel_axis, mask)
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape != x.shape[:-1]:
                given = f"{str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}"
                raise fail("QP105", f"mask is {given}, not bool {list(x.shape[:-1])}")
            x = x[mask.to(x.device)]
        if x.numel() == 0:
            return
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            x = x.float()
        with torch.no_grad():
            seen = None if self._seen is None else {name: value.to(x.device) for name, value in self._seen.items()}
            self._seen = self.config.collect(x) if seen is None else self.config.advance(seen, x)

    def observe(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Seed 001's word for `update`."""
        self.update(x, mask)

    def result(self, quantizer: Quantizer | None = None) -> Range:
        """The range found, for the grid of `quantizer` where the observer weighs errors (8-bit integers by default).

        Raises QuantplanError QP603 when nothing was seen, and for an observer that collects nothing.
        """
        if self.config.dynamic:
            raise fail("QP603", f"a {self.config.name} observer collects no range", "activations are quantized dynamically")
        if self._seen is None:
            raise fail("QP603", f"the {self.config.name} observer has seen no values", "run calibration data through the model")
        found = self.config.range(self._seen, quantizer)
        # copies: statistics may have been made in inference mode, whose tensors autograd refuses
        return Range(found.low.float().clone(), found.high.float().clone())

    def merge(self, other: Observer) -> None:
        """Takes in what another observer of the same config saw, as though it came after (data-parallel calibration).

        The same as one observer of both streams, exactly unless the config says `order_matters`. Raises QuantplanError
        QP105 for another config or other channels.
        """
        if other.config != self.config:
            raise fail("QP105", f"observers differ: {self.config!r} and {other.config!r}")
        if other._seen is None:
            return
        if self._seen is None:
            self._seen = other._seen
            return
        theirs = {name: value.to(self._seen[name].device) for name, value in other._seen.items()}
        for name, value in theirs.items():
            if value.shape != self._seen[name].shape:
                raise fail("QP105", f"{value.numel()} channels joined to {self._seen[name].numel()}")
        self._seen = self.config.join(self._seen, theirs)

    def reset(self) -> None:
        """Forgets everything seen."""
        self._seen = None

    def state(self) -> Statistics:
        """The statistics as tensors of their own on the CPU, ready for safetensors; empty when nothing was seen."""
        return {name: value.cpu().clone().contiguous() for name, value in (self._seen or {}).items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Replaces everything seen by what `state` returned.

        Raises QuantplanError QP105 when the tensors are not those of this config's statistics, NonFinite when they hold NaN
        or infinity; then nothing has changed.
        """
        import torch

        if not state:
            self._seen = None
            return
        like = self.config.collect(torch.zeros(1, 1))
        if state.keys() != like.keys():
            raise fail(
                "QP105",
                f"not statistics of a {self.config.name} observer",
                f"they are {', '.join(like)}" if like else "it has none",
            )
        for name, value in state.items():
            # a length of 1 in statistics of a 1x1 tensor is its number of channels: any will do
            fits = len(value.shape) == like[name].dim() and all(
                b in (1, a) for a, b in zip(value.shape, like[name].shape, strict=True)
            )
            if value.dtype != like[name].dtype or not fits:
                raise fail("QP105", f"statistics '{name}' do not fit a {self.config.name} observer with these options")
            check_finite(value)
        self._seen = {name: value.clone() for name, value in state.items()}

    def _channels_last(self, x: Tensor, axis: int, mask: Tensor | None) -> Tensor:
        """`x` with its channels on the last axis, as many as were seen before."""
        if not -x.dim() <= axis < x.dim():
            raise fail("QP105", f"axis {axis} is not one of a tensor with {x.dim()} axes")
        if mask is not None and axis % x.dim() != x.dim() - 1:
            raise fail("QP105", f"a mask picks tokens, and axis {axis} is not the last", "channels are features: axis -1")
        x = x.movedim(axis, -1)
        seen = self._seen["low"].shape[0] if self._seen else x.shape[-1]
        if x.numel() and seen != x.shape[-1]:
            raise fail("QP105", f"{x.shape[-1]} channels where {seen} were seen before")
        return x


def extremes(x: Tensor, by_channel: bool = False) -> tuple[Tensor, Tensor]:
    """The least and the largest value, float32: of everything, 0-d, or of each index of the last axis. Raises NonFinite."""
    import torch

    if by_channel:
        # an empty list of axes would mean all of them
        axes = tuple(range(x.dim() - 1)) or (0,)
        x = x.unsqueeze(0) if x.dim() == 1 else x
        low, high = x.amin(axes), x.amax(axes)
    else:
        low, high = torch.aminmax(x)
    low, high = low.float(), high.float()
    check_finite(torch.stack([low, high]))
    return low, high


def hull(first: Statistics, second: Statistics) -> Statistics:
    """`low` and `high` of two streams joined."""
    import torch

    return {"low": torch.minimum(first["low"], second["low"]), "high": torch.maximum(first["high"], second["high"])}


OBSERVERS: Registry[ObserverConfig] = Registry("observer", "observers")
