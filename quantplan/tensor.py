"""A quantized matrix: codes, parameters, shape and scheme."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from quantplan.scheme import SchemeConfig


@dataclass(frozen=True)
class QuantizedTensor:
    """A matrix on a scheme's grid.

    Invariants: `codes` is uint8 `[rows, columns]` (int32 for 16 bits), every code below `2 ** scheme.bits`; each of `params`
    is in the dtype it is stored in and has the shape `scheme.param_layout(rows, columns)` says; the matrix an engine computes
    with is `scheme.quantizer().dequantize(self)` and nothing else.
    """

    codes: Tensor
    params: Mapping[str, Tensor]
    scheme: SchemeConfig

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns


def concatenate(parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """One matrix from consecutive rows quantized apart. Parameters of the whole tensor are the same in every part."""
    import torch

    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    shared = first.scheme.tensor_params
    params = {n: p if n in shared else torch.cat([part.params[n] for part in parts]) for n, p in first.params.items()}
    return QuantizedTensor(torch.cat([part.codes for part in parts]), params, first.scheme)
