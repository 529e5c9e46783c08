"""Scales by least squared error, each weight of a matrix counting as its column does: what rounding and GPTQ both start from;
and by the least error of a group's outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantplan.scheme import BLOCK

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from quantplan.scheme import Params, Quantizer

PIECE = 1 << 18  # weights worked on at a time: a few float32 copies of them fit a core's cache
ROWS = 256  # at least so many rows are multiplied by a Hessian at a time: reading it is then a small part of it


@dataclass(frozen=True)
class Ranges:
    """What a search tries: `count` shares of a group's full range, from all of it to `lowest`. `signed`: steps may be negative,
    so that the level an integer grid has more on its negative side serves the group's largest weight, whatever its sign."""

    count: int
    lowest: float
    signed: bool = False


def search_scales(
    weight: Tensor,
    quantizer: Quantizer,
    importance: Tensor | None,
    ranges: Ranges,
    absmax: Tensor | None = None,
) -> Params:
    """Parameters for `weight` `[rows, columns]`, as `Quantizer.fit` makes them for its groups, with the least
    `sum(importance * (w - q)^2)` of those in `ranges`; ties go to the wider. `importance`: `[columns]`, at least 0; None counts
    all columns alike.

    Where steps are stored finely, each range is only a proposal of codes, and its step the least-squares one for them,
    `<w, c> / <c, c>` (as llama.cpp's `make_qx_quants` chooses it). Raises NonFinite.
    """
    rows, columns = weight.shape
    if quantizer.config.strategy in ("tensor", "block"):
        shares = None if importance is None else quantizer.groups(importance.expand(rows, columns))
        return _search(quantizer.groups(weight), quantizer, shares, ranges, absmax)
    shares = None if importance is None else quantizer.groups(importance[None])
    height = max(1, PIECE // columns)
    pieces = [
        _search(quantizer.groups(part), quantizer, shares, ranges, _whole(quantizer, weight, absmax))
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


def _search(groups: Tensor, quantizer: Quantizer, shares: Tensor | None, ranges: Ranges, absmax: Tensor | None) -> Params:
    import torch

    if absmax is None and quantizer.config.needs_absmax:
        absmax = groups.abs().amax()
    weighed = groups if shares is None else groups * shares
    best, turn = Cheapest(quantizer), None
    if ranges.signed and quantizer.config.lopsided:
        low, high = torch.aminmax(groups, dim=-1, keepdim=True)
        turn = torch.where(-low >= high, 1.0, -1.0)  # the longer side of the grid goes where the largest weight is
    for factor in quantizer.config.shrink_factors(ranges.count, ranges.lowest):
        params = quantizer.fit(groups, factor, absmax)
        if turn is not None:
            params = quantizer.with_step(params, quantizer.step(params) * turn)
        values = quantizer.nearest(groups, params)
        fits = (weighed * values).sum(-1, keepdim=True)
        size = (values.square() if shares is None else values.square().mul_(shares)).sum(-1, keepdim=True)
        if quantizer.config.fine_steps:
            ratio = torch.where(size > 0, fits / size, 1.0)
            params = quantizer.with_step(params, quantizer.step(params) * ratio)
            gain = fits * ratio  # the error it takes away: of the best step, not yet rounded
        else:
            gain = 2 * fits - size
        best.offer(params, -gain)
    return best.params


def search_by_hessian(
    weight: Tensor, quantizer: Quantizer, hessian: Tensor, ranges: Ranges, absmax: Tensor | None = None
) -> Params:
    """Parameters for `weight` `[rows, columns]` as `search_scales` gives them, with the least `e^T H_g e` in each group: `e` its
    rounding error, `H_g` the block of `hessian` `[columns, columns]` that its columns have (summed over rows where rows share
    parameters). So errors in columns that go together may make up for one another, within a group.

    Where steps are stored finely, each range is also tried with the least-squares step for its codes, `<w, H c> / <c, H c>`.
    What is compared is what is stored; ties go to the first tried. Raises NonFinite.
    """
    rows, columns = weight.shape
    absmax = _whole(quantizer, weight, absmax)
    wide = BLOCK if quantizer.config.strategy == "block" else columns // quantizer.config.grid(rows, columns)[1]
    push = _pushing(hessian, wide)
    if quantizer.config.strategy in ("tensor", "block"):
        return _search_by(push, quantizer.groups(weight), quantizer, ranges, absmax)
    pieces = weight.split(max(ROWS, PIECE // columns))
    return joined([_search_by(push, quantizer.groups(part), quantizer, ranges, absmax) for part in pieces], quantizer)


def _pushing(hessian: Tensor, wide: int) -> Callable[[Tensor], Tensor]:
    """A product of groups `[down, across, size]`, whose rows are `wide`, with the diagonal blocks of `hessian`, as one."""
    import torch

    hessian = torch.nn.functional.pad(hessian, (0, -len(hessian) % wide, 0, -len(hessian) % wide))
    across = len(hessian) // wide
    blocks = hessian.view(across, wide, across, wide).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()

    def push(groups: Tensor) -> Tensor:
        by_column = groups.view(len(groups), across, -1, wide).transpose(0, 1)
        pushed = torch.bmm(by_column.reshape(across, -1, wide), blocks)
        return pushed.view(by_column.shape).transpose(0, 1).reshape(groups.shape)

    return push


def _search_by(
    push: Callable[[Tensor], Tensor], groups: Tensor, quantizer: Quantizer, ranges: Ranges, absmax: Tensor | None
) -> Params:
    import torch

    best = Cheapest(quantizer)
    for factor in quantizer.config.shrink_factors(ranges.count, ranges.lowest):
        proposed = [quantizer.fit(groups, factor, absmax)]
        for params in proposed:
            values = quantizer.nearest(groups, params)
            error = values - groups
            cost = (error * push(error)).sum(-1, keepdim=True)
            if quantizer.config.fine_steps and len(proposed) == 1:
                pushed = push(values)
                size = (values * pushed).sum(-1, keepdim=True)
                ratio = torch.where(size > 0, (groups * pushed).sum(-1, keepdim=True) / size, 1.0)
                proposed.append(quantizer.with_step(params, quantizer.step(params) * ratio))
            best.offer(params, cost)
    return best.params


class Cheapest:
    """For each group, the parameters of least cost among those offered; the first of equals."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.params: Params = {}
        self._quantizer = quantizer
        self._least: Tensor | None = None

    def offer(self, params: Params, cost: Tensor) -> None:
        """Takes `params` over for the groups where `cost` `[..., 1]` is less than that of all before."""
        import torch

        if self._least is None:
            self.params, self._least = dict(params), cost
            return
        better = cost < self._least
        self._least = torch.where(better, cost, self._least)
        self.params = mixed(better, params, self.params, self._quantizer)


def mixed(better: Tensor, new: Params, old: Params, quantizer: Quantizer) -> Params:
    """`new` for the groups, or rows `[rows, 1, 1]`, where `better`, `old` for the others and for what the whole tensor shares."""
    own = quantizer.config.tensor_params
    return {n: p if n in own else choose(better.expand(p.shape), new[n], p) for n, p in old.items()}


def choose(condition: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`torch.where` for parameters with a last axis of 1 in any dtype: float8 has none, so it chooses among bytes."""
    import torch

    first, second = new.view(torch.uint8), old.view(torch.uint8)
    return torch.where(condition.repeat_interleave(first.shape[-1], -1), first, second).view(new.dtype)
