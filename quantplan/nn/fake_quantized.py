"""The layers of quantization-aware training: torch's own, with the weight and the inputs rounded on the way.

Parameters are the float layer's, under the same names, so that state dicts go from one to the other and back. Each class
has `from_float(layer, weight_fake_quant, input_fake_quant)`, a layer with the very parameters; `to_float()`, the way back; and
`converted()`, the quantized layer, which computes what this one does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantplan.errors import fail
from quantplan.nn.convolution import convolve
from quantplan.nn.fake_quantizer import FakeQuantizer
from quantplan.nn.quantize import quantized_layer
from quantplan.nn.stored import StoredWeight


class FakeQuantized(nn.Module):
    """What the layers of training have: `weight_fake_quant` rounds the weight, `input_fake_quant`, if any, the inputs."""

    weight: Any
    bias: Any
    weight_fake_quant: FakeQuantizer
    input_fake_quant: FakeQuantizer | None

    @classmethod
    def from_float(cls, layer: Any, weight: FakeQuantizer, inputs: FakeQuantizer | None = None) -> Any:
        """A layer with the very parameters of `layer`."""
        made: Any = cls._like(layer)
        made.weight_fake_quant, made.input_fake_quant = weight, inputs
        return _share(made, layer)

    def to_float(self) -> Any:
        """torch's layer with the very parameters, not rounded."""
        return _share(self._float_like(self), self)

    def converted(self) -> StoredWeight:
        """The quantized layer, with this very bias. Raises NonFinite; QuantplanError QP603 for static inputs never seen."""
        inputs = self.input_fake_quant
        solved = self.weight_fake_quant.solve(self.weight)
        if inputs is None or not inputs.enabled:
            return quantized_layer(self, solved, None)
        return quantized_layer(self, solved, inputs.scheme, inputs.static())

    def rounded_inputs(self, x: Tensor, axis: int = -1) -> Tensor:
        """`x` in the dtype autocast computes in, where it is on, and rounded; `axis`: that of features."""
        x = x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x
        if self.input_fake_quant is None:
            return x
        return self.input_fake_quant(x) if axis == -1 else self.input_fake_quant(x.movedim(axis, -1)).movedim(-1, axis)

    def rounded_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight on its grid."""
        rounded: Tensor = self.weight_fake_quant(self.weight.float())
        return rounded.to(dtype)

    @classmethod
    def _like(cls, layer: Any) -> Any:
        """An empty layer of this class."""
        raise NotImplementedError

    @staticmethod
    def _float_like(layer: Any) -> Any:
        """An empty float layer."""
        raise NotImplementedError


class FakeQuantizedLinear(FakeQuantized, nn.Linear):
    """`y = Q(x) Q(W)^T + b`."""

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` -> `[..., out_features]`, in the dtype of the input, or autocast's."""
        x = self.rounded_inputs(input)
        return functional.linear(x, self.rounded_weight(x.dtype), _as(self.bias, x.dtype))

    @classmethod
    def _like(cls, layer: nn.Linear) -> FakeQuantizedLinear:
        return cls(layer.in_features, layer.out_features, bias=False, device="meta")

    @staticmethod
    def _float_like(layer: nn.Linear) -> nn.Linear:
        return nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")


FakeQuantizeLinear = FakeQuantizedLinear  # seed 002's name


class FakeQuantizedConv(FakeQuantized):
    """`y = conv(Q(x), Q(W)) + b`, in 1, 2 or 3 dimensions, depthwise too."""

    def forward(self, input: Tensor) -> Tensor:
        """`[batch, in, ...]` -> `[batch, out, ...]`, in the dtype of the input, or autocast's."""
        geometry: Any = self
        x = self.rounded_inputs(input, -len(geometry.kernel_size) - 1)
        return convolve(self, x, self.rounded_weight(x.dtype), _as(self.bias, x.dtype))

    @classmethod
    def _like(cls, layer: Any) -> Any:
        return _convolution(cls, layer)

    @staticmethod
    def _float_like(layer: Any) -> Any:
        return _convolution({1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(layer.kernel_size)], layer)


class FakeQuantizedConv1d(FakeQuantizedConv, nn.Conv1d):
    """Of sequences `[batch, channels, length]`."""


class FakeQuantizedConv2d(FakeQuantizedConv, nn.Conv2d):
    """Of images `[batch, channels, height, width]`."""


class FakeQuantizedConv3d(FakeQuantizedConv, nn.Conv3d):
    """Of volumes `[batch, channels, depth, height, width]`."""


class FakeQuantizedEmbedding(FakeQuantized, nn.Embedding):
    """Rows of `Q(W)`."""

    def forward(self, input: Tensor) -> Tensor:
        """Ids of any shape -> `[..., embedding_dim]`."""
        options = self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse
        return functional.embedding(input, self.rounded_weight(self.weight.dtype), *options)

    @classmethod
    def _like(cls, layer: nn.Embedding) -> FakeQuantizedEmbedding:
        return _table(cls, layer)

    @staticmethod
    def _float_like(layer: nn.Embedding) -> nn.Embedding:
        return _table(nn.Embedding, layer)


FAKE_QUANTIZED: dict[type[nn.Module], type[FakeQuantized]] = {
    nn.Linear: FakeQuantizedLinear,
    nn.Conv1d: FakeQuantizedConv1d,
    nn.Conv2d: FakeQuantizedConv2d,
    nn.Conv3d: FakeQuantizedConv3d,
    nn.Embedding: FakeQuantizedEmbedding,
}


def fake_quantized(layer: nn.Module, weight: FakeQuantizer, inputs: FakeQuantizer | None = None) -> Any:
    """The layer of training for one of torch's. Raises QuantplanError QP222 for a module of another class."""
    member = FAKE_QUANTIZED.get(type(layer))
    if member is None:
        known = ", ".join(kind.__name__ for kind in FAKE_QUANTIZED)
        raise fail("QP222", f"a {type(layer).__name__} cannot be quantized in memory", f"these can: {known}")
    return member.from_float(layer, weight, None if member is FakeQuantizedEmbedding else inputs)


def _share(made: Any, layer: Any) -> Any:
    """In place: `made` takes the very parameters of `layer`, and its mode."""
    made.weight = layer.weight
    if not isinstance(layer, nn.Embedding):
        made.register_parameter("bias", layer.bias)
    return made.train(layer.training)


def _convolution(kind: Any, like: Any) -> Any:
    geometry = {n: getattr(like, n) for n in ("stride", "padding", "dilation", "groups", "padding_mode")}
    return kind(like.in_channels, like.out_channels, like.kernel_size, **geometry, bias=False, device="meta")


def _table(kind: Any, like: nn.Embedding) -> Any:
    if like.max_norm is not None:
        raise fail("QP222", "an embedding with max_norm changes its rows as they are read", "leave max_norm out")
    options = {n: getattr(like, n) for n in ("padding_idx", "scale_grad_by_freq", "sparse")}
    return kind(like.num_embeddings, like.embedding_dim, **options, device="meta")


def _as(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return bias.to(dtype) if bias is not None else None
