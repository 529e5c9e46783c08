"""Fusion: BatchNorm folded into the layer before it, so that the weight that is rounded is the one that is used.

In evaluation `y = gamma (W x + b - mean) / sqrt(var + eps) + beta` is one layer. In training the weight is rounded as it will be
folded, with the running variance, and the batch's own statistics are applied to what comes out (Jacob et al. 2018,
arXiv 1712.05877, section 3.2; the correction is Krishnamoorthi 2018's, arXiv 1806.08342, section 3.2.2).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantplan.errors import fail
from quantplan.nn.convolution import convolve
from quantplan.nn.fake_quantized import FakeQuantized, fake_quantized
from quantplan.nn.fake_quantizer import FakeQuantizer
from quantplan.nn.stored import StoredWeight

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# what follows what: torch.ao's patterns
PATTERNS = (
    (LAYERS, NORMS),
    (LAYERS, NORMS, (nn.ReLU,)),
    (LAYERS, (nn.ReLU,)),
    (NORMS, (nn.ReLU,)),
)


class LayerBatchNorm(nn.Sequential):
    """A layer and the BatchNorm that follows it, in training: `0` and `1` of the state dict."""


class FakeQuantizedBatchNorm(nn.Sequential):
    """A layer and its BatchNorm, with the weight rounded as it will be folded; `0` and `1` of the state dict, as before.

    In training, and unless `freeze_bn_stats` was called, the output is normalized by the batch; else it is, bit for bit, that
    of the folded and converted layer.
    """

    def __init__(self, layer: nn.Module, norm: nn.Module, weight: FakeQuantizer, inputs: FakeQuantizer | None) -> None:
        super().__init__(layer, norm)
        self.weight_fake_quant, self.input_fake_quant, self.frozen = weight, inputs, False

    @property
    def weight(self) -> Tensor:
        """The folded weight, float."""
        return folded(self[0], self[1])[0]

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, in, ...]` -> `[batch, out, ...]`."""
        layer: Any = self[0]
        norm = self[1]
        if self.input_fake_quant is not None:
            axis = 1 if x.dim() > 2 else -1
            x = self.input_fake_quant(x.movedim(axis, -1)).movedim(-1, axis)
        if not norm.training:
            weight, bias = folded(layer, norm)
            return run(layer, x, self.weight_fake_quant(weight.float()).to(x.dtype), bias.to(x.dtype))
        factor = fold_factor(norm)
        factor = torch.where(factor == 0, 1, factor)  # a gamma of zero: the norm itself multiplies by it
        weight = self.weight_fake_quant((layer.weight * wide(factor, layer.weight)).float()).to(x.dtype)
        y = run(layer, x, weight, None)
        channels = (1, -1, *(1,) * (y.dim() - 2))
        y = y / factor.view(channels)
        return norm(y if layer.bias is None else y + layer.bias.view(channels))

    def train(self, mode: bool = True) -> FakeQuantizedBatchNorm:
        """The mode; a frozen BatchNorm stays in evaluation."""
        super().train(mode)
        if self.frozen:
            self[1].eval()
        return self

    def folded_layer(self) -> FakeQuantized:
        """The layer of training without its BatchNorm."""
        made: FakeQuantized = fake_quantized(fold(self[0], self[1]), self.weight_fake_quant, self.input_fake_quant)
        return made.train(self.training)

    def converted(self) -> StoredWeight:
        """The folded and quantized layer. Raises as `FakeQuantized.converted`."""
        return self.folded_layer().converted()


def freeze_bn_stats(module: nn.Module) -> None:
    """For `model.apply`: from now on BatchNorm's statistics stay as they are, in training too."""
    if isinstance(module, FakeQuantizedBatchNorm):
        module.frozen = True
        module[1].eval()


def update_bn_stats(module: nn.Module) -> None:
    """For `model.apply`: the inverse of `freeze_bn_stats`."""
    if isinstance(module, FakeQuantizedBatchNorm):
        module.frozen = False
        module[1].train(module.training)


def fuse_modules(model: nn.Module, modules_to_fuse: Sequence[str] | Sequence[Sequence[str]], inplace: bool = False) -> nn.Module:
    """A copy of `model` (with `inplace`, itself) with these modules fused, each list of names in the order they are called; the
    first name holds what they became, the others an identity. What is fused already stays.

    A BatchNorm in evaluation is folded into the layer before it; one in training stays beside it, for `prepare_qat`. Raises
    QuantplanError QP105 for a list that is none of `PATTERNS`, or names what is not there.
    """
    model = model if inplace else copy.deepcopy(model)
    lists: list[Any] = [modules_to_fuse] if modules_to_fuse and isinstance(modules_to_fuse[0], str) else list(modules_to_fuse)
    for names in lists:
        _fuse(model, list(names))
    return model


def fuse_modules_qat(model: nn.Module, modules_to_fuse: Any, inplace: bool = False) -> nn.Module:
    """`fuse_modules` of a model in training. Raises QuantplanError QP105 for one in evaluation."""
    if not model.training:
        raise fail("QP105", "fuse_modules_qat takes a model in training", "call model.train() first, or fuse_modules")
    return fuse_modules(model, modules_to_fuse, inplace)


def _fuse(model: nn.Module, names: list[str]) -> None:
    try:
        found = [model.get_submodule(name) for name in names]
    except AttributeError as error:
        raise fail("QP105", f"cannot fuse {', '.join(names)}: {error}") from None
    if len(found) > 1 and all(type(module) is nn.Identity for module in found[1:]):
        return  # fused before
    if not any(len(p) == len(found) and all(isinstance(m, k) for m, k in zip(found, p, strict=True)) for p in PATTERNS):
        kinds = ", ".join(type(m).__name__ for m in found)
        raise fail("QP105", f"{', '.join(names)} are {kinds}, which is no pattern", "a layer, BatchNorm and ReLU, in this order")
    parts: list[nn.Module] = list(found)
    if len(found) > 1 and isinstance(found[0], LAYERS) and isinstance(found[1], NORMS):
        layer, norm = found[0], found[1]
        parts[:2] = [LayerBatchNorm(layer, norm).train(norm.training) if norm.training else fold(layer, norm)]
    made = parts[0] if len(parts) == 1 else nn.Sequential(*parts).train(found[0].training)
    for index, name in enumerate(names):
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, nn.Identity() if index else made)


def fold_factor(norm: Any) -> Tensor:
    """What BatchNorm multiplies each channel by in evaluation: `gamma / sqrt(var + eps)`."""
    if norm.running_var is None:
        raise fail("QP105", "a BatchNorm without running statistics cannot be folded", "leave it unfused")
    gamma = norm.weight if norm.weight is not None else torch.ones_like(norm.running_var)
    return gamma * torch.rsqrt(norm.running_var + norm.eps)


def folded(layer: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of the layer that computes both."""
    factor = fold_factor(norm)
    bias = layer.bias if layer.bias is not None else torch.zeros_like(norm.running_mean)
    beta = norm.bias if norm.bias is not None else 0
    return layer.weight * wide(factor, layer.weight), (bias - norm.running_mean) * factor + beta


@torch.no_grad()
def fold(layer: Any, norm: Any) -> Any:
    """A copy of `layer` with the BatchNorm folded in."""
    weight, bias = folded(layer, norm)
    made = copy.deepcopy(layer)
    made.weight, made.bias = nn.Parameter(weight.to(layer.weight.dtype)), nn.Parameter(bias.to(layer.weight.dtype))
    return made


def run(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer or a convolution with another weight and bias."""
    return functional.linear(x, weight, bias) if isinstance(layer, nn.Linear) else convolve(layer, x, weight, bias)


def wide(factor: Tensor, weight: Tensor) -> Tensor:
    """A number for each row, as wide as the weight."""
    return factor.view(-1, *(1,) * (weight.dim() - 1))
