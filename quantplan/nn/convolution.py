"""`QuantConv`: a convolution in 1, 2 or 3 dimensions whose weight is stored quantized, depthwise ones too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantplan.nn.stored import Device, StoredWeight
from quantplan.scheme import Params, SchemeConfig
from quantplan.tensor import QuantizedTensor

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


class QuantConv(StoredWeight):
    """`y = conv(x, W) + b` with `W`, `[out, in / groups, ...]`, on a scheme's grid as `[out, columns]`: granularity `channel`
    is a scale for each filter. The weight is dequantized for each batch. `aq` rounds inputs `[batch, channels, ...]`: a `token`
    is the channels of one place.
    """

    def __init__(
        self,
        like: Convolution,
        wq: SchemeConfig,
        aq: SchemeConfig | None = None,
        *,
        device: Device = None,
        bias: bool | None = None,
    ) -> None:
        """Uninitialised storage for a convolution such as `like`, of which only the geometry is taken. Raises QP114."""
        has_bias = like.bias is not None if bias is None else bias
        super().__init__(tuple(like.weight.shape), wq, aq, has_bias, device, like.weight.dtype, like.in_channels)
        self.in_channels, self.out_channels, self.kernel_size = like.in_channels, like.out_channels, like.kernel_size
        self.stride, self.padding, self.dilation, self.groups = like.stride, like.padding, like.dilation, like.groups
        self.padding_mode, self._around = like.padding_mode, like._reversed_padding_repeated_twice

    @classmethod
    def from_quantized(
        cls,
        quantized: QuantizedTensor,
        like: Convolution,
        bias: nn.Parameter | None = None,
        aq: SchemeConfig | None = None,
        *,
        inputs: Params | None = None,
    ) -> QuantConv:
        """A convolution of the geometry of `like` with this weight `[out, columns]` and this very bias. `inputs`: what static
        activations need, as `Quantizer.fit_static` makes it."""
        made = cls(like, quantized.scheme, aq, device="meta", bias=False)
        made.fill(quantized, bias, inputs)
        return made

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, in, ...]` -> `[batch, out, ...]`, in the dtype of `x`, or autocast's."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        axis = -len(self.kernel_size) - 1
        x = self.rounded(x.movedim(axis, -1)).movedim(-1, axis) if self.aq is not None else x
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return convolve(self, x, self.dequantize().view(self._shape).to(x.dtype), bias)

    def extra_repr(self) -> str:
        shown = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        return f"{shown}, groups={self.groups}, bias={self.bias is not None}, {self._schemes()}"


def convolve(geometry: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of `nn.Conv1d` and its like with another weight and bias."""
    run = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[len(geometry.kernel_size)]
    padding = geometry.padding
    if geometry.padding_mode != "zeros":
        around = geometry._around if isinstance(geometry, QuantConv) else geometry._reversed_padding_repeated_twice
        x, padding = functional.pad(x, around, mode=geometry.padding_mode), 0
    return run(x, weight, bias, geometry.stride, padding, geometry.dilation, geometry.groups)
