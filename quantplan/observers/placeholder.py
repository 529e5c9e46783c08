"""placeholder: collects nothing, because ranges are taken from each tensor as it comes."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from quantplan.errors import fail
from quantplan.observer import OBSERVERS, ObserverConfig, Range, Statistics

if TYPE_CHECKING:
    from torch import Tensor

    from quantplan.scheme import Quantizer


@OBSERVERS.register("placeholder")
class PlaceholderConfig(ObserverConfig):
    """Collects nothing: the range of each tensor or token is taken as it comes, at run time."""

    use: ClassVar[str] = "dynamic quantization"
    dynamic: ClassVar[bool] = True

    def collect(self, x: Tensor) -> Statistics:
        return {}

    def join(self, first: Statistics, second: Statistics) -> Statistics:
        return {}

    def range(self, seen: Statistics, quantizer: Quantizer | None) -> Range:
        raise fail("QP603", "a placeholder observer collects no range")
