"""bias_correction: biases make up for what quantizing does to the outputs on average."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from quantplan.transform import TRANSFORMS, Transform

if TYPE_CHECKING:
    from torch import Tensor


@TRANSFORMS.register("bias_correction")
class BiasCorrection(Transform):
    """Adds `(W - Q) E[x]` to the bias of each matrix that has one, after it is quantized (Nagel et al. 2019, arXiv 1906.04721).
    Models without biases are refused."""

    corrects: ClassVar[bool] = True

    def bias(self, weight: Tensor, quantized: Tensor, mean: Tensor) -> Tensor:
        gained: Tensor = (weight - quantized) @ mean
        return gained
