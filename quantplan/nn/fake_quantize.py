"""Fake quantization: values rounded to a scheme's grid in floating point, with the gradients of training.

The value passes through: its gradient is the output's, and zero where it was clamped (the straight-through estimator, Bengio et
al. 2013, arXiv 1308.3432). A step `s` and a zero point `z` may be learned (LSQ, Esser et al. 2020, arXiv 1902.08153; LSQ+,
Bhalgat et al. 2020, arXiv 2004.09576): with `q` the level chosen and `y = x / s`, a value counts for `s` as `q - y`, clamped ones
as `q`, and for `z` as 0, clamped ones as `-s`. For integers these are torch's `_fake_quantize_learnable_*` kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantplan.scheme import Params, Quantizer, largest_magnitude


def fake_quantize(
    x: Tensor,
    quantizer: Quantizer,
    params: Params | None = None,
    *,
    step: Tensor | None = None,
    zero_point: Tensor | None = None,
    absmax: Tensor | None = None,
    gradient_scale: float = 1.0,
) -> Tensor:
    """`x`, `[..., columns]` of any float dtype, as `dequantize(quantize(x))` gives it, bit for bit, in its own dtype.

    `params`: the parameters, shaped as `QuantizedTensor.params` of the `[rows, columns]` matrix; by default fitted to `x` itself,
    with `absmax` as `Quantizer.fit` takes it. `step`, float32 of the shape of `scale`, and `zero_point`, float32 on the grid's
    unsigned levels, take their places and are given gradients, times `gradient_scale`; what is used is the storable step nearest
    to `step`, and the zero point rounded and clamped. Raises NonFinite where parameters are fitted to NaN or infinity.
    """
    if x.numel() == 0:
        return x
    groups = quantizer.groups(x.reshape(-1, x.shape[-1]).float())
    found = fitted(groups, quantizer, absmax) if params is None else widened(params, quantizer)
    return _restored(round_groups(groups, quantizer, found, step, zero_point, gradient_scale), quantizer, x)


def fake_quantize_static(x: Tensor, quantizer: Quantizer, found: Params) -> Tensor:
    """`x`, `[..., features]`, as `Quantizer.round_static` gives it, bit for bit, with the straight-through gradient."""
    if x.numel() == 0:
        return x
    groups = quantizer.groups(x.reshape(-1, x.shape[-1]).float())
    return _restored(round_groups(groups, quantizer, quantizer.static_params(groups.detach(), found)), quantizer, x)


@torch.no_grad()
def fitted(groups: Tensor, quantizer: Quantizer, absmax: Tensor | None = None) -> Params:
    """The parameters that `Quantizer.quantize` takes for these groups."""
    if absmax is None and quantizer.config.needs_absmax:
        absmax = largest_magnitude(groups).amax()
    return quantizer.fit(groups, absmax=absmax)


def round_groups(
    groups: Tensor,
    quantizer: Quantizer,
    params: Params,
    step: Tensor | None = None,
    zero_point: Tensor | None = None,
    gradient_scale: float = 1.0,
) -> Tensor:
    """The grid's values nearest to groups `[..., size]`, float32, with the gradients; `params` as `Quantizer.fit` makes them,
    `step` and `zero_point` as `fake_quantize` takes them."""
    own = quantizer.config.tensor_params
    learned = with_learned({n: p if n in own else p.squeeze(-1) for n, p in params.items()}, quantizer, step, zero_point)
    return _Rounded.apply(groups, step, zero_point, quantizer, widened(learned, quantizer), gradient_scale)


def widened(params: Params, quantizer: Quantizer) -> Params:
    """Parameters shaped as `QuantizedTensor`'s, shaped as `Quantizer.fit` makes them: with a last axis of 1."""
    return {n: p if n in quantizer.config.tensor_params else p.unsqueeze(-1) for n, p in params.items()}


@torch.no_grad()
def with_learned(params: Params, quantizer: Quantizer, step: Tensor | None, zero_point: Tensor | None) -> Params:
    """`params`, shaped as `QuantizedTensor`'s, with the storable ones nearest to what was learned."""
    own = quantizer.config.tensor_params
    if step is not None:
        stepped = quantizer.with_step(widened(params, quantizer), step.float().unsqueeze(-1))
        params = {n: p if n in own else p.squeeze(-1) for n, p in stepped.items()}
    return params if zero_point is None else quantizer.with_zero_point(params, zero_point)


def _restored(values: Tensor, quantizer: Quantizer, x: Tensor) -> Tensor:
    """Groups in the shape and dtype of what they were made of."""
    return quantizer.ungroup(values, x.numel() // x.shape[-1], x.shape[-1]).view(x.shape).to(x.dtype)


class _Rounded(torch.autograd.Function):
    """Groups on the grid, and the gradients of the groups, their step and their zero point."""

    @staticmethod
    def forward(
        ctx: Any,
        groups: Tensor,
        step: Tensor | None,
        zero_point: Tensor | None,
        quantizer: Quantizer,
        params: Params,
        gradient_scale: float,
    ) -> Tensor:
        values = quantizer.nearest(groups, params)
        if any(ctx.needs_input_grad):
            low, high = quantizer.reach(params)
            unit = quantizer.step(params)
            units = groups / unit
            outside = (units < low) | (units >= high)
            # what a value counts for the step
            share = (values / unit).sub_(units.masked_fill_(outside, 0)) if ctx.needs_input_grad[1] else None
            ctx.save_for_backward(outside, share, unit if ctx.needs_input_grad[2] else None)
            ctx.gradient_scale = gradient_scale
            ctx.shapes = step.shape if step is not None else None, zero_point.shape if zero_point is not None else None
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        outside, share, unit = ctx.saved_tensors
        found: list[Tensor | None] = [gradient.masked_fill(outside, 0) if ctx.needs_input_grad[0] else None, None, None]
        if share is not None:
            found[1] = _collected(gradient * share, ctx.shapes[0], ctx.gradient_scale)
        if unit is not None:
            found[2] = _collected(gradient.masked_fill(~outside, 0) * -unit, ctx.shapes[1], ctx.gradient_scale)
        return (*found, None, None, None)


def _collected(shares: Tensor, shape: torch.Size, scale: float) -> Tensor:
    """The gradient of a parameter of `shape`, from what each value counts, `[..., size]`."""
    return shares.sum(-1).sum_to_size(shape) * scale
