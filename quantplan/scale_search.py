"""Scales by least squared error, each weight of a matrix counting as its column does: what rounding and GPTQ both start from."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from quantplan.scheme import Params, Quantizer

PIECE = 1 << 18  # weights worked on at a time: a few float32 copies of them fit a core's cache


def search_scales(
    weight: Tensor, quantizer: Quantizer, importance: Tensor | None, grid: int, lowest: float, absmax: Tensor | None = None
) -> Params:
    """Parameters for `weight` `[rows, columns]`, as `Quantizer.fit` makes them for its groups, with the least
    `sum(importance * (w - q)^2)` of `grid` ranges, the whole one first and the narrowest `lowest` of it; ties go to the wider.
    `importance`: `[columns]`, at least 0; None counts all columns alike.

    Where steps are stored finely, each range is only a proposal of codes, and its step the least-squares one for them,
    `<w, c> / <c, c>` (as llama.cpp's `make_qx_quants` chooses it). Raises NonFinite.
    """
    rows, columns = weight.shape
    if quantizer.config.strategy in ("tensor", "block"):
        shares = None if importance is None else quantizer.groups(importance.expand(rows, columns))
        return _search(quantizer.groups(weight), quantizer, shares, grid, lowest, absmax)
    shares = None if importance is None else quantizer.groups(importance[None])
    height = max(1, PIECE // columns)
    pieces = [
        _search(quantizer.groups(part), quantizer, shares, grid, lowest, _whole(quantizer, weight, absmax))
        for part in weight.split(height)
    ]
    return joined(pieces, quantizer)


def joined(pieces: list[Params], quantizer: Quantizer) -> Params:
    """The parameters of consecutive rows as those of all."""
    import torch

    own = quantizer.config.tensor_params
    return {n: p if n in own else torch.cat([piece[n] for piece in pieces]) for n, p in pieces[0].items()}


def _whole(quantizer: Quantizer, weight: Tensor, absmax: Tensor | None) -> Tensor | None:
    return weight.abs().amax() if absmax is None and quantizer.config.needs_absmax else absmax


def _search(
    groups: Tensor, quantizer: Quantizer, shares: Tensor | None, grid: int, lowest: float, absmax: Tensor | None
) -> Params:
    import torch

    if absmax is None and quantizer.config.needs_absmax:
        absmax = groups.abs().amax()
    weighed = groups if shares is None else groups * shares
    best: Params = {}
    most: Tensor | None = None
    for factor in quantizer.config.shrink_factors(grid, lowest):
        params = quantizer.fit(groups, factor, absmax)
        values = quantizer.nearest(groups, params)
        fits = (weighed * values).sum(-1, keepdim=True)
        size = (values.square() if shares is None else values.square().mul_(shares)).sum(-1, keepdim=True)
        if quantizer.config.fine_steps:
            ratio = torch.where(size > 0, fits / size, 1.0)
            params = quantizer.with_step(params, quantizer.step(params) * ratio)
            gain = fits * ratio  # the error it takes away: of the best step, not yet rounded
        else:
            gain = 2 * fits - size
        if most is None:
            best, most = dict(params), gain
            continue
        better = gain > most
        most = torch.where(better, gain, most)
        for name in params.keys() - quantizer.config.tensor_params:
            best[name] = choose(better, params[name], best[name])
    return best


def choose(condition: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`torch.where` for parameters with a last axis of 1 in any dtype: float8 has none, so it chooses among bytes."""
    import torch

    first, second = new.view(torch.uint8), old.view(torch.uint8)
    return torch.where(condition.repeat_interleave(first.shape[-1], -1), first, second).view(new.dtype)
